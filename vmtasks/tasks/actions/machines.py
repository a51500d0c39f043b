"""Actions on the configured machine, and checks of this host."""

import sys
import time

from vmtasks import printable
from vmtasks.config.load import help_table, show_size
from vmtasks.config.tables import Download
from vmtasks.errors import MissingToolError
from vmtasks.host import process, progress
from vmtasks.images.workspace import CLEAN
from vmtasks.machines import Machine, MachineState, Project, health, life
from vmtasks.tasks.actions.images import run_step
from vmtasks.tasks.context import CONFIG, VARIABLES

EXIT = {
    "running": 0,
    "booting": 11,
    "stopped": 4,
    "stale": 5,
    "absent": 6,
    "unreachable": 7,
    "paused": 8,
    "panicked": 9,
    "damaged": 10,
}
"""Exit status of `status` by state. 1, 2 and 3 are doit's: a task failed, an error, bad arguments."""


def configured_machine() -> Machine:
    """The machine of vm.toml, after machines whose owner has died were removed."""
    Project(CONFIG.root, variables=VARIABLES).reap()
    return Machine(CONFIG)


def snapshot(*, name: str) -> None:
    """Publish the clean image, or save the machine's disk as snapshot `name`."""
    if not name:
        run_step("snapshot")
        progress.say(f"{CONFIG.label}: the clean image is ready")
        return
    saved = configured_machine().snapshot(name)
    progress.say(f"snapshot {name}: {show_size(saved.virtual_size)} disk, {saved.size >> 20} MiB stored")


def start() -> None:
    """Start the machine and print the command that logs in."""
    machine = configured_machine()
    machine.start()
    progress.say(f"machine {machine.name}: ssh -F {machine.folder / 'ssh_config'} {machine.name}")


def stop() -> None:
    """Stop the machine if it runs."""
    machine = configured_machine()
    if machine.stop() == "already stopped":
        progress.say(f"machine {machine.name} is not running")


def restore(*, name: str) -> None:
    """Reset the machine's disk to snapshot `name`, or to the clean one."""
    machine = configured_machine()
    image = machine.restore(name or CLEAN)
    progress.say(f"machine {machine.name}: restored to {name or CLEAN} ({image.digest[:12]})")


def destroy(*, yes: bool) -> None:
    """Remove the machine, after a question unless `yes`."""
    machine = configured_machine()
    if not machine.folder.exists():
        progress.say(f"there is no machine {machine.name}; nothing was removed")
        return
    if not yes:
        progress.confirm(f"Remove machine {machine.name} and its disk?", "doit destroy --yes")
    removed = life.destroy(machine.place)
    progress.say(f"machine {machine.name}: removed {', '.join(path.name for path in removed)}")


def login() -> None:
    """Log in to the machine; exits with the status of the login shell if that is not 0."""
    status = configured_machine().shell()
    if status != 0:
        raise SystemExit(status)


def status() -> None:
    """Print the machine's state and exit with its code from EXIT. Removes no machines."""
    state = Machine(CONFIG).status()
    sys.stdout.write("".join(f"{printable.text(line)}\n" for line in describe(state)))
    sys.stdout.flush()
    if EXIT[state.status]:
        raise SystemExit(EXIT[state.status])


def describe(state: MachineState) -> list[str]:
    """The lines of `status`."""
    meaning = {
        "absent": "absent: no such machine yet; `doit start` makes it",
        "booting": "booting: QEMU runs, SSH does not answer yet",
        "running": "running: SSH answers",
        "unreachable": "unreachable: QEMU runs, and SSH, which has answered before, does not; vmtasks doctor says why",
        "paused": "paused: its CPU is stopped; vmtasks doctor says why, vmtasks resume lets it go on",
        "panicked": "panicked: the guest's kernel panicked",
        "damaged": f"damaged: its record cannot be read: {state.fault}; `doit stop` ends its QEMU, `doit destroy`"
        " removes it",
        "stale": "stale: it ended without being stopped; `doit start` starts it again",
        "stopped": "stopped",
    }
    lines = [f"machine {state.name} is {meaning[state.status]}"]
    record = state.record
    if record is not None:
        source = f"{record.snapshot} ({record.image[:12]})" if record.image else "installed by hand"
        lines.append(f"  image    {record.guest} {source}")
    if record is not None and state.ssh:
        up = progress.seconds(time.time() - record.started)
        lines += [
            f"  process  pid {record.pid}, up {up}, {record.cpus} CPU, {show_size(record.memory)}, {record.accel}",
            f"  ssh      {state.ssh}",
            f"  port     127.0.0.1:{record.ssh_port}",
        ]
    return lines


def check_prereqs() -> None:
    """Print one line for each thing that this host needs. MissingToolError names what is missing."""
    composing = [] if isinstance(CONFIG.guest.installer, Download) else ["apt-get"]
    missing = []
    for layer in health.host_layers(CONFIG, (*process.REQUIRED, *composing)):
        progress.say(f"{'✓' if layer.passed else '✗'} {layer.name}: {layer.says}")
        if not layer.passed:
            missing.append(layer.name)
    if missing:
        raise MissingToolError(f"missing: {', '.join(missing)}", hint="./doit installs programs, if you permit it")


def help_vars() -> None:
    """Print the table of variables."""
    rows = [("variable", "environment", "value", "from", "meaning"), *help_table(CONFIG)]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
        sys.stdout.write(f"{cells}  {row[4]}".rstrip() + "\n")
