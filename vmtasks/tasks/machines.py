"""Tasks about machines: start, stop, status, ssh, snapshot, restore, destroy, check_prereqs, help_vars."""

import sys
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from vmtasks import printable
from vmtasks.config.load import help_table, show_size
from vmtasks.config.tables import Download
from vmtasks.errors import MissingToolError
from vmtasks.host import progress
from vmtasks.images.workspace import CLEAN, State
from vmtasks.tasks.context import CONFIG, VARIABLES, action, asked_with
from vmtasks.tasks.images import judge, run_step, without_option
from vmtasks.tasks.reporter import Said

Task = dict[str, Any]
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
"""Exit status of `status` by state. 1, 2 and 3 are doit's: a task failed, an error, words that it cannot parse."""

NAME_PARAM = {"name": "name", "long": "name", "short": "n", "type": str, "default": "", "help": "name of a snapshot"}
YES_PARAM = {"name": "yes", "long": "yes", "short": "y", "type": bool, "default": False, "help": "do not ask"}


if TYPE_CHECKING:
    from vmtasks.machines import Machine, MachineState


def the_machine(*, reap: bool = True) -> "Machine":
    """The configured machine, after what the dead have left was removed.

    Imported only when it is needed: most runs have nothing to do.
    """
    from vmtasks.machines import Machine, Project  # noqa: PLC0415

    if reap:
        Project(CONFIG.root, variables=VARIABLES).reap()
    return Machine(CONFIG)


def task_snapshot() -> Task:
    """Name the finished image `clean`; with --name, save the stopped machine's disk under that name.

    A saved snapshot needs no other image, so that restoring, changing and saving again keeps both. A machine that runs
    is refused: its disk is not at rest. A name that is taken is given to the new one.

    Exit status: 0 saved; 1 the machine runs or has no disk, or a phase failed; 2 no name for a snapshot.
    Example: doit stop && doit snapshot --name before-upgrade
    """
    state, last = State(CONFIG), len(CONFIG.guest.phases)

    def snapshot(name: str) -> None:
        if not name:
            run_step("snapshot")
            progress.say(f"{CONFIG.label}: the clean image is ready")
            return
        saved = the_machine().snapshot(name)
        progress.say(f"snapshot {name}: {show_size(saved.virtual_size)} disk, {saved.size >> 20} MiB stored")

    # A machine's disk can be saved whatever the phases' scripts are like just now.
    needs = [] if asked_with("snapshot", "--name") else [f"phase:{last}"]
    return {
        "actions": [(action(snapshot),)],
        "task_dep": needs,
        "targets": [str(state.clean_record)],
        "uptodate": [judge("snapshot"), without_option("name")],
        "params": [NAME_PARAM],
        "meta": {
            "fresh": Said(lambda: f"{CONFIG.label}: the clean image is up to date"),
            "reads": [str(state.record(last))],
        },
        "io": {"capture": False},
    }


def task_start() -> Task:
    """Start the machine, and wait until SSH answers.

    Ready means that a login has succeeded. A machine that runs already is left alone. One whose image was built anew
    is made afresh from it, and says so; one of another guest or version is refused. After a failure QEMU is ended, and
    the console's last lines are shown.

    Exit status: 0 it answers; 1 it does not, or its port is taken; 2 wrong configuration.
    Example: doit name=second port=auto memory=2G cpus=4 start
    """

    def start() -> None:
        machine = the_machine()
        machine.start()
        progress.say(f"machine {machine.name}: ssh -F {machine.folder / 'ssh_config'} {machine.name}")

    return {"actions": [action(start)], "task_dep": images_needed(), "io": {"capture": False}}


@cache
def images_needed() -> list[str]:
    """What must be made before the machine can start: nothing, if it was installed or its snapshot saved by hand."""
    return ["snapshot"] if State(CONFIG).on_clean(CONFIG.name) else []


def task_stop() -> Task:
    """Stop the machine: power off in the guest first, harder only if that fails.

    Then the ACPI power button, QMP quit, SIGTERM, SIGKILL, each with its deadline; the output says which was needed.
    Only a process that is provably this machine's is signalled.

    Exit status: 0 it does not run; 1 there is no such machine.
    Example: doit name=second stop
    """

    def stop() -> None:
        machine = the_machine()
        if machine.stop() == "already stopped":
            progress.say(f"machine {machine.name} is not running")

    return {"actions": [action(stop)], "io": {"capture": False}}


def task_restore() -> Task:
    """Go back to the clean snapshot, or to the one that --name says; what the machine has written is lost.

    Nothing is copied: the disk becomes an empty overlay on the snapshot. A machine that runs is stopped first.

    Exit status: 0 restored; 1 there is no such snapshot (those that there are are named).
    Example: doit restore --name before-upgrade && doit start
    """

    def restore(name: str) -> None:
        machine = the_machine()
        image = machine.restore(name or CLEAN)
        progress.say(f"machine {machine.name}: restored to {name or CLEAN} ({image.digest[:12]})")

    return {"actions": [(action(restore),)], "params": [NAME_PARAM], "io": {"capture": False}}


def task_destroy() -> Task:
    """Remove the machine and its disk; asks first, unless --yes is given.

    Images, snapshots, the installer and the keys stay. Without a terminal it removes nothing unless --yes is given.

    Exit status: 0 it is gone, or was not there; 1 nothing was removed.
    Example: doit name=second destroy --yes
    """

    def destroy(yes: bool) -> None:  # noqa: FBT001 - doit passes parameters by name
        machine = the_machine()
        if not machine.folder.exists():
            progress.say(f"there is no machine {machine.name}; nothing was removed")
            return
        if not yes:
            progress.confirm(f"Remove machine {machine.name} and its disk?", "doit destroy --yes")
        from vmtasks.machines import life  # noqa: PLC0415

        gone = life.destroy(machine.place)
        progress.say(f"machine {machine.name}: removed {', '.join(path.name for path in gone)}")

    return {"actions": [(action(destroy),)], "params": [YES_PARAM], "io": {"capture": False}}


def task_ssh() -> Task:
    """Log in to the running machine.

    The same as `ssh -F .vm/run/<machine>/ssh_config <machine>`, which scp, sftp, rsync and git can use too.

    Exit status: that of the login shell; 1 the machine does not run; 255 ssh failed.
    Example: doit name=second ssh
    """

    def login() -> None:
        status = the_machine().shell()
        if status != 0:
            raise SystemExit(status)

    return {"actions": [action(login)], "io": {"capture": False}}


def task_status() -> Task:
    """Say what the machine is doing: running, booting, stopped and so on, also by exit status.

    Stale: it ended without being stopped. Unreachable: SSH has answered, and does not now. The task changes nothing and
    waits for nobody, and may be asked at any time, also while another command works on the machine.

    Exit status: 0 running, SSH answers; 11 booting; 4 stopped; 5 stale; 6 absent; 7 unreachable; 8 paused; 9 panicked;
    10 its record cannot be read; 2 wrong configuration.
    Example: doit status || doit start
    """

    def status() -> None:
        view = the_machine(reap=False).status()
        sys.stdout.write("".join(f"{printable.text(line)}\n" for line in describe(view)))
        sys.stdout.flush()
        if EXIT[view.status]:
            raise SystemExit(EXIT[view.status])

    return {"actions": [action(status)], "io": {"capture": False}}


def describe(view: "MachineState") -> list[str]:
    """The lines of `status`."""
    meaning = {
        "absent": "absent: no such machine yet; `doit start` makes it",
        "booting": "booting: QEMU runs, SSH does not answer yet",
        "running": "running: SSH answers",
        "unreachable": "unreachable: QEMU runs, and SSH, which has answered before, does not; vmtasks doctor says why",
        "paused": "paused: its CPU stands still; vmtasks doctor says why, vmtasks resume lets it go on",
        "panicked": "panicked: the guest's kernel has given up",
        "damaged": f"damaged: its record cannot be read: {view.fault}; `doit stop` ends what runs of it, `doit destroy`"
        " removes it",
        "stale": "stale: it ended without being stopped; `doit start` starts it again",
        "stopped": "stopped",
    }
    lines = [f"machine {view.name} is {meaning[view.status]}"]
    record = view.record
    if record is not None:
        made = f"{record.snapshot} ({record.image[:12]})" if record.image else "installed by hand"
        lines.append(f"  image    {record.guest} {made}")
    if record is not None and view.ssh:
        up = progress.seconds(time.time() - record.started)
        lines += [
            f"  process  pid {record.pid}, up {up}, {record.cpus} CPU, {show_size(record.memory)}, {record.accel}",
            f"  ssh      {view.ssh}",
            f"  port     127.0.0.1:{record.ssh_port}",
        ]
    return lines


def task_check_prereqs() -> Task:
    """Check that all programs are there, that the accelerator works, and that there is space.

    Says for each program where it is, or which command installs it. The accelerator is tried by real work: KVM that
    opens may still hang.

    Exit status: 0 all is there; 1 something is missing.
    Example: doit check_prereqs
    """

    def check() -> None:
        from vmtasks.host import process  # noqa: PLC0415
        from vmtasks.machines import health  # noqa: PLC0415

        composed = [] if isinstance(CONFIG.guest.installer, Download) else ["apt-get"]
        missing = []
        for layer in health.host_layers(CONFIG, (*process.REQUIRED, *composed)):
            progress.say(f"{'✓' if layer.passed else '✗'} {layer.name}: {layer.says}")
            if not layer.passed:
                missing.append(layer.name)
        if missing:
            raise MissingToolError(f"missing: {', '.join(missing)}", hint="./doit installs programs, if you permit it")

    return {"actions": [action(check)], "io": {"capture": False}}


def task_help_vars() -> Task:
    """List the variables that can be given as NAME=VALUE or in the environment, with their values.

    And where each value comes from. Strongest first: NAME=VALUE, the environment, the configuration file, guest.toml.

    Exit status: 0; 2 wrong configuration.
    Example: doit version=6.4.0 help_vars
    """

    def show() -> None:
        rows = [("variable", "environment", "value", "from", "meaning"), *help_table(CONFIG)]
        widths = [max(len(row[n]) for row in rows) for n in range(4)]
        for row in rows:
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
            sys.stdout.write(f"{cells}  {row[4]}".rstrip() + "\n")

    return {"actions": [action(show)], "io": {"capture": False}}
