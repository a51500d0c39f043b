"""`vmtasks ps | start | restart | stop | rm | wait | pause | resume`: a machine's life cycle."""

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
    each,
    find_machine,
    project,
    selected,
    show,
    table,
)
from vmtasks.cli.look import machine_json
from vmtasks.errors import ConfigError, SshError, StateError
from vmtasks.host import progress
from vmtasks.machines import Machine, health
from vmtasks.qemu import vm
from vmtasks.qemu.vm import wait_until

WAIT_S = 600


Force = Annotated[
    bool, typer.Option("--force", "-f", help="Cut the power: do not ask the guest, do not wait for another command.")
]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds for each of: power off in the guest, ACPI.", show_default=False)
]


@app.command(rich_help_panel="Machines")
def ps(
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only names.")] = False,
) -> None:
    """List machines with image, status, uptime, ports and sessions."""
    if quiet and as_json:
        raise ConfigError("ps: --quiet and --json do not go together")
    here = project()
    if quiet:
        sys.stdout.write("".join(f"{name}\n" for name in here.names()))
        return
    machines = list(here.machines())
    with ThreadPoolExecutor(8) as threads:  # a machine that does not answer must not delay the others
        found = list(threads.map(machine_json, machines))
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
    """Start machines and wait until SSH answers; running ones are left alone."""
    _start(names or [], every=every, as_json=as_json, before=lambda _: None)


@app.command(rich_help_panel="Machines")
def restart(
    names: Names = None, every: Every = False, force: Force = False, timeout: Timeout = None, as_json: AsJson = False
) -> None:
    """Stop machines as `stop` does, then start them; stopped ones are only started."""

    def stop_first(machine: Machine) -> None:
        if machine.folder.exists():
            machine.stop(gentle=not force, timeout_s=timeout)

    _start(names or [], every=every, as_json=as_json, before=stop_first)


def _start(names: list[str], *, every: bool, as_json: bool, before: Callable[[Machine], object]) -> None:
    """Start machines and print how to log in to each."""
    here, shown = project(), []
    wanted = selected(here, names, every=every)

    def work(name: str) -> None:
        machine = here.machine(name) if names or every else here.default()
        before(machine)
        machine.start()
        if as_json:
            shown.append(machine_json(machine))
        else:
            sys.stdout.write(f"{machine.ssh_line()}\n")
            sys.stdout.flush()

    try:
        each(wanted, work)
    finally:
        if as_json and (shown or every or len(wanted) > 1):
            show(shown if every or len(wanted) > 1 else shown[0])


@app.command(rich_help_panel="Machines")
def stop(names: Names = None, every: Every = False, force: Force = False, timeout: Timeout = None) -> None:
    """Stop machines: power off in the guest, then ACPI, QMP quit, SIGTERM, SIGKILL; prints which was needed."""
    here = project()

    def work(name: str) -> None:
        machine = here.machine(name)
        record = machine.place.state.machine(machine.name)
        rung = machine.stop(gentle=not force, timeout_s=timeout)
        if rung == "already stopped":
            progress.say(f"machine {machine.name} is not running")
        if record is not None and record.throwaway:
            machine.remove()
            progress.say(f"machine {machine.name}: removed")

    each(selected(here, names or [], every=every), work)


@app.command(rich_help_panel="Machines")
def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Machines.", autocompletion=complete.names, show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="All of `vmtasks run`; not the project's own.")] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also running ones; do not ask, do not wait for another command.")
    ] = False,
) -> None:
    """Remove machines with their disks and keys; images and snapshots stay.

    --all leaves alone the machine that `doit start` makes: name it here, or use `doit destroy`.
    """
    if every == bool(names):
        raise ConfigError("rm: name machines, or give --all")
    here = project()
    machines: list[Machine] = []

    def add(name: str) -> None:
        machine = here.machine(name)
        if not force and machine.place.is_running():
            raise StateError(f"running: {name}; nothing was removed", hint=f"vmtasks stop {name}, or rm --force")
        machines.append(machine)

    wanted = [machine.name for machine in here.own_machines()] if every else selected(here, names or [], every=False)
    attempts = Attempts(wanted)
    for name in wanted:
        with attempts.of(name):
            add(name)
    if machines and not force:
        named = "--all" if every else shlex.join(names or [])
        question = f"Remove {', '.join(machine.name for machine in machines)} with all that is on their disks?"
        progress.confirm(question, f"vmtasks rm --force {named}")
    for machine in machines:
        with attempts.of(machine.name):
            machine.remove(force=force)
            progress.say(f"machine {machine.name}: removed")
    if every and not wanted:
        progress.say("there are no machines of `vmtasks run`; nothing was removed")
    attempts.end()


@app.command(rich_help_panel="Machines")
def wait(
    name: Name,
    stopped: Annotated[bool, typer.Option("--stopped", help="Wait until it has stopped, not for SSH.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = WAIT_S,
) -> None:
    """Wait until SSH answers, or until the machine has stopped; exits with 1 after the timeout."""
    machine = find_machine(name)

    def has_stopped() -> bool:
        return not machine.place.is_running()

    def is_ready() -> bool:
        return has_stopped() or machine.status().status == "running"

    if not wait_until(has_stopped if stopped else is_ready, timeout, every_s=0.5):
        if stopped:
            raise StateError(f"machine {name} has not stopped within {timeout:g} s")
        raise SshError(
            f"machine {name} accepted no login within {timeout:g} s: {health.is_alive(machine.place).reason}"
        )
    if not stopped:
        machine.require_running()


@app.command(rich_help_panel="Machines")
def pause(name: Name) -> None:
    """Pause a machine's CPU."""
    _run_qmp(name, "stop")


@app.command(rich_help_panel="Machines")
def resume(name: Name) -> None:
    """Resume a paused machine."""
    _run_qmp(name, "cont")


def _run_qmp(name: str, command: str) -> None:
    machine = find_machine(name)
    machine.require_running()
    vm.control(machine.place.qmp, command)()
