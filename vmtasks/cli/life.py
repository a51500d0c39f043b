"""`vmtasks ps | start | stop | rm | wait | pause | resume`: a machine's life."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from vmtasks.cli.common import AnyName, AsJson, Name, app, confirm, machine, project, show, table

WAIT_S = 600


@app.command(rich_help_panel="Machines")
def ps(as_json: AsJson = False) -> None:
    """List machines: what they are, what they do, and who uses them now."""
    from vmtasks import progress  # noqa: PLC0415
    from vmtasks.cli.look import described  # noqa: PLC0415

    machines = list(project().machines())
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
def start(name: AnyName = "", as_json: AsJson = False) -> None:
    """Start a machine, and wait until it lets us in; one that runs already is left as it is."""
    from vmtasks.cli.look import described  # noqa: PLC0415

    here = project()
    found = here.machine(name) if name else here.default()
    found.start()
    if as_json:
        show(described(found))
    else:
        sys.stdout.write(f"{found.ssh_line()}\n")


@app.command(rich_help_panel="Machines")
def stop(
    name: AnyName = "",
    force: Annotated[
        bool,
        typer.Option("--force", "-f", help="Do not ask the guest, nor wait for another command: cut its power."),
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for each of: power off in the guest, ACPI.", show_default=False)
    ] = None,
) -> None:
    """Stop a machine: power off in the guest, then ACPI, QMP quit, SIGTERM, SIGKILL; says which was needed."""
    from vmtasks import progress  # noqa: PLC0415

    found = machine(name)
    record = found.state.machine(found.name)
    rung = found.stop(gentle=not force, timeout_s=timeout)
    if rung == "already stopped":
        progress.say(f"machine {found.name} is not running")
    if record is not None and record.throwaway:
        found.destroy(lambda _: None)
        progress.say(f"machine {found.name}: removed")


@app.command(rich_help_panel="Machines")
def rm(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Machines.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="All of `vmtasks run`; not the project's own.")] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Running ones too, ask nobody, wait for no other command.")
    ] = False,
) -> None:
    """Remove machines with their disks and keys; images and snapshots stay.

    --all leaves alone what `doit start` has made: only its name, given here, or `doit destroy` removes that.
    """
    from vmtasks import progress  # noqa: PLC0415
    from vmtasks.errors import ConfigError, StateError, VmTasksError  # noqa: PLC0415

    if every == bool(names):
        raise ConfigError("rm: name machines, or give --all")
    here = project()
    found = here.own_machines() if every else [here.machine(name) for name in dict.fromkeys(names or [])]
    if not found:
        progress.say("there are no machines of `vmtasks run`; nothing was removed")
        return
    failed = 0
    running = [one.name for one in found if one.runs()]
    if running and not force:
        raise StateError(f"running: {', '.join(running)}; nothing was removed", hint="stop them first, or rm --force")
    if not force:
        confirm(f"Remove {', '.join(one.name for one in found)} with all that is on their disks?", "vmtasks rm --force")
    for one in found:
        try:
            one.destroy(lambda _: None, force=force)
        except VmTasksError as error:
            progress.say(f"error: machine {one.name}: {error}")
            failed += 1
        else:
            progress.say(f"machine {one.name}: removed")
    raise typer.Exit(1 if failed else 0)


@app.command(rich_help_panel="Machines")
def wait(
    name: Name,
    stopped: Annotated[bool, typer.Option("--stopped", help="Wait for its end, not for its SSH.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = WAIT_S,
) -> None:
    """Wait until a machine lets us in, or until it has ended; exit status 1 when that takes too long."""
    from vmtasks.errors import SshError, StateError  # noqa: PLC0415
    from vmtasks.machine.vm import wait_until  # noqa: PLC0415
    from vmtasks.session import health  # noqa: PLC0415

    found = machine(name)

    def settled() -> bool:
        return not found.runs() or found.status().status == "running"

    if not wait_until((lambda: not found.runs()) if stopped else settled, timeout, every_s=0.5):
        if stopped:
            raise StateError(f"machine {name} has not ended within {timeout:g} s")
        raise SshError(f"machine {name} does not let us in within {timeout:g} s: {health.is_alive(found).reason}")
    if not stopped:
        found.running()


@app.command(rich_help_panel="Machines")
def pause(name: Name) -> None:
    """Stop a machine's CPU, and keep it as it is."""
    _tell(name, "stop")


@app.command(rich_help_panel="Machines")
def resume(name: Name) -> None:
    """Let a machine's CPU run on."""
    _tell(name, "cont")


def _tell(name: str, command: str) -> None:
    from vmtasks.machine import vm  # noqa: PLC0415

    found = machine(name)
    found.running()
    vm.control(found.qmp, command)()
