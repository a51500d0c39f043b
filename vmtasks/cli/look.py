"""`vmtasks inspect | logs | port | doctor`: look at a machine, or at this host."""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from vmtasks import printable
from vmtasks.cli import complete
from vmtasks.cli.common import AnyName, AsJson, Every, Name, Names, app, chosen, each, machine, project, show, table
from vmtasks.config.arguments import Forward
from vmtasks.errors import ConfigError, MachineError
from vmtasks.machines import Machine, Project, health
from vmtasks.machines.sessions import uses
from vmtasks.store.store import Store

POLL_S = 0.2


def described(found: "Machine") -> dict[str, Any]:
    """A machine as every `--json` shows it; docs/machines.md has the keys."""
    view = found.status()
    if view.record is None:
        return {**unknown(found), "status": view.status, "fault": view.fault}
    record = view.record
    alive = view.status not in ("stale", "stopped")
    target = found.place.target(record)
    forwards = [Forward(record.ssh_port, 22), *map(Forward.parse, record.forwards)] if alive else []
    return {
        "name": found.name,
        "status": view.status,
        "image": f"{record.family or record.guest}:{record.snapshot}",
        "digest": record.image,
        "created": record.created,
        "started": record.started,
        "removed_when_stopped": record.throwaway,
        "pid": record.pid if alive else 0,
        "cpu_s": _cpu_s(record.pid) if alive else 0.0,
        "rss": _rss(record.pid) if alive else 0,
        "accel": record.accel,
        "cpus": record.cpus,
        "memory": record.memory,
        "network": record.network,
        "user": record.ssh_user,
        "key": str(target.key),
        "ssh_config": str(found.folder / "ssh_config"),
        "ssh": view.ssh,
        "ports": [msgspec.to_builtins(forward) for forward in forwards],
        "binds": [msgspec.to_builtins(bind) for bind in record.binds],
        "sessions": [asdict(use) for use in uses(found.place)],
        "fault": "",
    }


def unknown(found: "Machine") -> dict[str, Any]:
    """The same keys for a machine of which nothing is recorded: the process that was found for it, and where it is."""
    try:
        process = found.place.process()
    except MachineError:  # it is somebody else's
        process = None
    pid = process.number if process is not None else 0
    texts = ("image", "digest", "accel", "network", "user", "key", "ssh_config", "ssh")
    return {
        "name": found.name,
        **dict.fromkeys(texts, ""),
        "created": 0.0,
        "started": 0.0,
        "removed_when_stopped": False,
        "pid": pid,
        "cpu_s": _cpu_s(pid) if pid else 0.0,
        "rss": _rss(pid) if pid else 0,
        "cpus": 0,
        "memory": 0,
        "ports": [],
        "binds": [],
        "sessions": [],
    }


def _cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used; see proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss(pid: int) -> int:
    """Bytes of memory that a process holds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@app.command(rich_help_panel="Look")
def inspect(names: Names = None, every: Every = False) -> None:
    """Show all that is known of machines, as a list in JSON."""
    here: Project = project()
    shown: list[dict[str, Any]] = []

    def look(name: str) -> None:
        found = here.machine(name)
        record = found.place.state.machine(name)
        shown.append(
            {
                **described(found),
                "disk_size": record.disk_size if record is not None else 0,
                "folder": str(found.folder),
                "disk": str(found.place.disk),
                "console_log": str(found.place.console_log),
                "qemu_log": str(found.place.qemu_log),
            }
        )

    try:
        each(chosen(here, names or [], every=every), look)
    finally:
        show(shown)


@app.command(rich_help_panel="Look")
def logs(
    name: AnyName = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the machine ends.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="As it came, with control sequences.")] = False,
    qemu: Annotated[bool, typer.Option("--qemu", help="What QEMU said, not the guest.")] = False,
) -> None:
    """Print what the serial console has said."""
    found = machine(name)
    path = found.place.qemu_log if qemu else found.place.console_log
    cleaner = printable.Cleaner()
    out = sys.stdout.buffer

    while not path.exists() and follow and found.place.runs():
        time.sleep(POLL_S)
    if not path.exists():
        return
    with path.open("rb") as log:
        while True:
            last = not found.place.runs()  # asked first: what is said before the end is then still read
            data = log.read(65536)
            out.write(data if raw else cleaner.feed(data).encode())
            out.flush()
            if not data:
                if not follow or last:
                    return
                time.sleep(POLL_S)


@app.command(rich_help_panel="Look")
def port(name: Name, as_json: AsJson = False) -> None:
    """Show which loopback ports lead to which ports of a machine."""
    found = machine(name)
    found.require_running()
    ports = described(found)["ports"]
    if as_json:
        show(ports)
    else:
        table(("HOST", "GUEST"), [(f"127.0.0.1:{item['host']}", str(item["guest"])) for item in ports])


@app.command(rich_help_panel="Look")
def doctor(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A machine; without one, this host.", autocompletion=complete.names)
    ] = "",
    store: Annotated[
        bool, typer.Option("--store", help="Read every byte of the images and downloads in the store.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at this host, or at a machine layer by layer; exit status 1 when something is wrong, and says what."""
    if name and store:
        raise ConfigError("--store looks at all images of this host's store: leave the machine out")
    here = project()
    if store:
        looks = health.store_layers(Store(here.config().store_dir))
    else:
        looks = health.machine_layers(here.machine(name).place) if name else health.host_layers(here.config())
    layers = []
    for layer in looks:
        layers.append(layer)
        if not as_json:
            mark = {True: "✓", False: "✗", None: "-"}[layer.passed]
            sys.stdout.write(printable.line(f"{mark} {layer.name}: {layer.says}") + "\n")
            sys.stdout.flush()
    if as_json:
        show([asdict(layer) for layer in layers])
    raise typer.Exit(1 if any(layer.passed is False for layer in layers) else 0)
