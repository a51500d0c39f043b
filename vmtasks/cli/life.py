"""`vmtasks ps | start | restart | stop | rm | wait | pause | resume`: a machine's life."""

import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from vmtasks.cli import complete
from vmtasks.cli.common import (
    AsJson,
    Attempts,
    Every,
    Name,
    Names,
    app,
    chosen,
    each,
    machine,
    project,
    show,
    table,
)
from vmtasks.cli.look import described
from vmtasks.errors import ConfigError, SshError, StateError
from vmtasks.host import progress
from vmtasks.machines import Machine, health
from vmtasks.qemu import vm
from vmtasks.qemu.vm import wait_until

WAIT_S = 600


Force = Annotated[
    bool, typer.Option("--force", "-f", help="Do not ask the guest, nor wait for another command: cut its power.")
]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds for each of: power off in the guest, ACPI.", show_default=False)
]


@app.command(rich_help_panel="Machines")
def ps(
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only their names.")] = False,
) -> None:
    """List machines: what they are, what they do, and who uses them now."""
    if quiet and as_json:
        raise ConfigError("ps: --quiet and --json do not go together")
    here = project()
    if quiet:
        sys.stdout.write("".join(f"{name}\n" for name in here.names()))
        return
    machines = list(here.machines())
    with ThreadPoolExecutor(8) as threads:  # one that does not answer must not hold up the others
        found = list(threads.map(described, machines))
    if as_json:
        show(found)
        return
    rows = []
    for item in found:
        alive = item["pid"] != 0
        up = progress.seconds(time.time() - float(item["started"])) if alive and item["started"] else ""
        ports = ", ".join(f"{port['host']}:{port['guest']}" for port in item["ports"])
        rows.append((item["name"], item["image"], item["status"], up, ports, str(len(item["sessions"]))))
    table(("NAME", "IMAGE", "STATUS", "UP", "PORTS", "SESSIONS"), rows)
    for item in found:
        if item["fault"]:
            runs = f"its QEMU, process {item['pid']}, runs" if item["pid"] else "no QEMU of it was found"
            progress.say(f"machine {item['name']}: its record cannot be read: {item['fault']}; {runs}")


@app.command(rich_help_panel="Machines")
def start(names: Names = None, every: Every = False, as_json: AsJson = False) -> None:
    """Start machines, and wait until they let us in; one that runs already is left as it is."""
    _start(names or [], every=every, as_json=as_json, before=lambda _: None)


@app.command(rich_help_panel="Machines")
def restart(
    names: Names = None, every: Every = False, force: Force = False, timeout: Timeout = None, as_json: AsJson = False
) -> None:
    """Stop machines as `stop` does, and start them; one that does not run is started."""

    def stop_first(found: "Machine") -> None:
        if found.folder.exists():
            found.stop(gentle=not force, timeout_s=timeout)

    _start(names or [], every=every, as_json=as_json, before=stop_first)


def _start(names: list[str], *, every: bool, as_json: bool, before: "Callable[[Machine], object]") -> None:
    """Start machines, and show how to log in to each."""
    here, shown = project(), []
    wanted = chosen(here, names, every=every)

    def work(name: str) -> None:
        found = here.machine(name) if names or every else here.default()
        before(found)
        found.start()
        if as_json:
            shown.append(described(found))
        else:
            sys.stdout.write(f"{found.ssh_line()}\n")
            sys.stdout.flush()

    try:
        each(wanted, work)
    finally:
        if as_json and (shown or every or len(wanted) > 1):
            show(shown if every or len(wanted) > 1 else shown[0])


@app.command(rich_help_panel="Machines")
def stop(names: Names = None, every: Every = False, force: Force = False, timeout: Timeout = None) -> None:
    """Stop machines: power off in the guest, then ACPI, QMP quit, SIGTERM, SIGKILL; says which was needed."""
    here = project()

    def work(name: str) -> None:
        found = here.machine(name)
        record = found.place.state.machine(found.name)
        rung = found.stop(gentle=not force, timeout_s=timeout)
        if rung == "already stopped":
            progress.say(f"machine {found.name} is not running")
        if record is not None and record.throwaway:
            found.remove()
            progress.say(f"machine {found.name}: removed")

    each(chosen(here, names or [], every=every), work)


@app.command(rich_help_panel="Machines")
def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Machines.", autocompletion=complete.names, show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="All of `vmtasks run`; not the project's own.")] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Running ones too, ask nobody, wait for no other command.")
    ] = False,
) -> None:
    """Remove machines with their disks and keys; images and snapshots stay.

    --all leaves alone what `doit start` has made: only its name, given here, or `doit destroy` removes that.
    """
    if every == bool(names):
        raise ConfigError("rm: name machines, or give --all")
    here = project()
    found: list[Machine] = []

    def look(name: str) -> None:
        one = here.machine(name)
        if not force and one.place.runs():
            raise StateError(f"running: {name}; nothing was removed", hint=f"vmtasks stop {name}, or rm --force")
        found.append(one)

    wanted = [one.name for one in here.own_machines()] if every else chosen(here, names or [], every=False)
    attempts = Attempts(wanted)
    for name in wanted:
        with attempts.of(name):
            look(name)
    if found and not force:
        named = "--all" if every else shlex.join(names or [])
        question = f"Remove {', '.join(one.name for one in found)} with all that is on their disks?"
        progress.confirm(question, f"vmtasks rm --force {named}")
    for one in found:
        with attempts.of(one.name):
            one.remove(force=force)
            progress.say(f"machine {one.name}: removed")
    if every and not wanted:
        progress.say("there are no machines of `vmtasks run`; nothing was removed")
    attempts.end()


@app.command(rich_help_panel="Machines")
def wait(
    name: Name,
    stopped: Annotated[bool, typer.Option("--stopped", help="Wait for its end, not for its SSH.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = WAIT_S,
) -> None:
    """Wait until a machine lets us in, or until it has ended; exit status 1 when that takes too long."""
    found = machine(name)

    def settled() -> bool:
        return not found.place.runs() or found.status().status == "running"

    if not wait_until((lambda: not found.place.runs()) if stopped else settled, timeout, every_s=0.5):
        if stopped:
            raise StateError(f"machine {name} has not ended within {timeout:g} s")
        raise SshError(f"machine {name} does not let us in within {timeout:g} s: {health.is_alive(found.place).reason}")
    if not stopped:
        found.require_running()


@app.command(rich_help_panel="Machines")
def pause(name: Name) -> None:
    """Stop a machine's CPU, and keep it as it is."""
    _tell(name, "stop")


@app.command(rich_help_panel="Machines")
def resume(name: Name) -> None:
    """Let a machine's CPU run on."""
    _tell(name, "cont")


def _tell(name: str, command: str) -> None:

    found = machine(name)
    found.require_running()
    vm.control(found.place.qmp, command)()
