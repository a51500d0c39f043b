"""`vmtasks inspect | logs | port | doctor`: inspect a machine or this host."""

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
from vmtasks.cli.common import (
    AnyName,
    AsJson,
    Every,
    Name,
    Names,
    app,
    each,
    find_machine,
    project,
    selected,
    show,
    table,
)
from vmtasks.config.arguments import Forward
from vmtasks.errors import ConfigError, MachineError
from vmtasks.machines import Machine, health
from vmtasks.machines.sessions import active_sessions
from vmtasks.store.store import Store

POLL_S = 0.2


def machine_json(machine: Machine) -> dict[str, Any]:
    """A machine as `--json` shows it; docs/machines.md has the keys."""
    state = machine.status()
    if state.record is None:
        return {**_without_record(machine), "status": state.status, "fault": state.fault}
    record = state.record
    alive = state.status not in ("stale", "stopped")
    target = machine.place.target(record)
    forwards = [Forward(record.ssh_port, 22), *map(Forward.parse, record.forwards)] if alive else []
    return {
        "name": machine.name,
        "status": state.status,
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
        "ssh_config": str(machine.folder / "ssh_config"),
        "ssh": state.ssh,
        "ports": [msgspec.to_builtins(forward) for forward in forwards],
        "binds": [msgspec.to_builtins(bind) for bind in record.binds],
        "sessions": [asdict(use) for use in active_sessions(machine.place)],
        "fault": "",
    }


def _without_record(machine: Machine) -> dict[str, Any]:
    """The same keys for a machine without a readable record; `pid` is of the QEMU that was found for it."""
    try:
        process = machine.place.process()
    except MachineError:  # another user's
        process = None
    pid = process.number if process is not None else 0
    texts = ("image", "digest", "accel", "network", "user", "key", "ssh_config", "ssh")
    return {
        "name": machine.name,
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
    """CPU time of a process in seconds; see proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss(pid: int) -> int:
    """Resident memory of a process in bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@app.command(rich_help_panel="Look")
def inspect(names: Names = None, every: Every = False) -> None:
    """Print all details of machines as a JSON list."""
    here = project()
    shown: list[dict[str, Any]] = []

    def look(name: str) -> None:
        machine = here.machine(name)
        record = machine.place.state.machine(name)
        shown.append(
            {
                **machine_json(machine),
                "disk_size": record.disk_size if record is not None else 0,
                "folder": str(machine.folder),
                "disk": str(machine.place.disk),
                "console_log": str(machine.place.console_log),
                "qemu_log": str(machine.place.qemu_log),
            }
        )

    try:
        each(selected(here, names or [], every=every), look)
    finally:
        show(shown)


@app.command(rich_help_panel="Look")
def logs(
    name: AnyName = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the machine stops.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Keep control sequences.")] = False,
    qemu: Annotated[bool, typer.Option("--qemu", help="QEMU's log instead of the console's.")] = False,
) -> None:
    """Print the log of the serial console."""
    machine = find_machine(name)
    path = machine.place.qemu_log if qemu else machine.place.console_log
    cleaner = printable.Cleaner()
    out = sys.stdout.buffer

    while not path.exists() and follow and machine.place.is_running():
        time.sleep(POLL_S)
    if not path.exists():
        return
    with path.open("rb") as log:
        while True:
            last = not machine.place.is_running()  # first, so that output from just before the end is still read
            data = log.read(65536)
            out.write(data if raw else cleaner.feed(data).encode())
            out.flush()
            if not data:
                if not follow or last:
                    return
                time.sleep(POLL_S)


@app.command(rich_help_panel="Look")
def port(name: Name, as_json: AsJson = False) -> None:
    """List the loopback ports that are forwarded to a machine."""
    machine = find_machine(name)
    machine.require_running()
    ports = machine_json(machine)["ports"]
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
    """Diagnose this host, or a machine layer by layer; exits with 1 when a check fails."""
    if name and store:
        raise ConfigError("--store checks the whole store of this host: leave the machine out")
    here = project()
    if store:
        checks = health.store_layers(Store(here.config().store_dir))
    else:
        checks = health.machine_layers(here.machine(name).place) if name else health.host_layers(here.config())
    layers = []
    for layer in checks:
        layers.append(layer)
        if not as_json:
            mark = {True: "✓", False: "✗", None: "-"}[layer.passed]
            sys.stdout.write(printable.line(f"{mark} {layer.name}: {layer.says}") + "\n")
            sys.stdout.flush()
    if as_json:
        show([asdict(layer) for layer in layers])
    raise typer.Exit(1 if any(layer.passed is False for layer in layers) else 0)
