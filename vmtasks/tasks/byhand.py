"""Tasks for a person at the guest: install, look:N, provision."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from vmtasks.host import progress
from vmtasks.tasks.context import CONFIG, action
from vmtasks.tasks.machines import YES_PARAM, the_machine

Task = dict[str, Any]

DISPLAY_PARAM = {
    "name": "display",
    "long": "display",
    "type": bool,
    "default": False,
    "help": "open a window with the machine's screen",
}


def task_install() -> Task:
    """Install by hand: boot the installer with its console here, on the machine's own empty disk.

    A second CD has the public key and key.sh, which lets it in; what to type is said when it starts. Ctrl-A X ends the
    machine. Then: `doit install --disk` to go on with what was installed, `doit start`, `doit provision --phase N`,
    `doit stop`, `doit snapshot --name NAME`. A machine that has a disk is asked about first: that disk is lost.

    Exit status: 0 QEMU was ended at its console, or the guest powered off; 1 no terminal, no window, or QEMU failed.
    Example: doit name=byhand install --display
    """

    def install(yes: bool, display: bool, disk: bool, user: str) -> None:  # noqa: FBT001 - doit passes them by name
        from vmtasks.byhand import console  # noqa: PLC0415
        from vmtasks.images.steps import Builder  # noqa: PLC0415

        shown = console.window(wanted=display)
        if disk:
            console.go_on(Builder(CONFIG), display=shown)
            return
        machine = the_machine()
        if machine.place.disk.exists() and not yes:
            progress.confirm(f"Machine {machine.name} has a disk already. Install over it?", "doit install --yes")
        console.install(Builder(CONFIG), user=user, display=shown)

    flag = {"type": bool, "default": False}
    return {
        "actions": [action(install)],
        "params": [
            {"name": "disk", "long": "disk", **flag, "help": "go on: boot what was installed, not the installer"},
            DISPLAY_PARAM,
            {"name": "user", "long": "user", "type": str, "default": "root", "help": "who the key logs in as"},
            YES_PARAM,
        ],
        "setup": ["fetch"],
        "io": {"capture": False},
    }


def task_provision() -> Task:
    """Run a phase's script on the running machine, over SSH: the last one, or the one that --phase says.

    As root, with the same steps and the same verdict as at its boot, and without one. For trying changes of a script
    on a snapshot of your own, and for machines that were installed by hand. `.vm/run/<machine>/` has the log.

    Exit status: 0 its script ended with 0; 1 it failed, took too long, or the connection was lost; 2 no such phase.
    Example: doit restore --name mine start provision && doit stop && doit snapshot --name mine
    """

    def provision(phase: int) -> None:
        from vmtasks.byhand.provision import provision as run  # noqa: PLC0415

        log = run(CONFIG, phase)
        progress.say(f"log: {log}")
        progress.say("to keep what it did: doit stop, doit snapshot --name NAME")

    return {
        "actions": [(action(provision),)],
        "params": [
            {"name": "phase", "long": "phase", "type": int, "default": 0, "help": "number of the phase; 0: the last"}
        ],
        "setup": ["fetch"],
        "io": {"capture": False},
    }


def task_look() -> Iterator[Task]:
    """Boot what a phase boots, on a throw-away copy of its disk, with the console here, to look.

    Also if nothing has failed. The phase's CD is left out, so that the phase does not run, unless --cd is given.
    --live starts the installer's live system with the disk attached, for one that lets nobody in yet. Ctrl-A X ends it.

    Exit status: 0 QEMU was ended at its console, or the guest powered off; 1 no terminal, or QEMU failed.
    Example: doit look:2 --live
    """
    flag = {"type": bool, "default": False}
    for number, phase in enumerate(CONFIG.guest.phases, start=1):
        yield {
            "name": str(number),
            "doc": f"look at what {phase.name} starts from",
            "actions": [(action(partial(_look, number)),)],
            "params": [
                {"name": "cd", "long": "cd", **flag, "help": "with the phase's CD: the phase runs, nothing is kept"},
                DISPLAY_PARAM,
                {"name": "live", "long": "live", **flag, "help": "start the installer's live system, disk attached"},
            ],
            "task_dep": [f"phase_iso:{number}", f"phase:{number - 1}" if number > 1 else "fetch"],
            "io": {"capture": False},
        }


def _look(number: int, cd: bool, live: bool, display: bool) -> None:  # noqa: FBT001 - doit passes them by name
    from vmtasks.byhand import console  # noqa: PLC0415
    from vmtasks.images.steps import Builder  # noqa: PLC0415

    console.look(Builder(CONFIG), number, cd=cd, live=live, display=console.window(wanted=display))
