"""Tasks for a person at the guest: install, look:N, provision."""

from collections.abc import Iterator
from typing import Any

from vmtasks.tasks.context import CONFIG, action
from vmtasks.tasks.machines import YES_PARAM

Task = dict[str, Any]

DISPLAY_PARAM = {
    "name": "display",
    "long": "display",
    "type": bool,
    "default": False,
    "help": "open a window with the machine's screen",
}


def task_install() -> Task:
    """Install by hand: boot the installer with its console here, on an empty disk of the machine.

    A second CD has the public key and key.sh, which authorizes it; the start prints what to type. Ctrl-A X quits QEMU.
    Then: `doit install --disk` to boot what was installed, `doit start`, `doit provision --phase N`, `doit stop`,
    `doit snapshot --name NAME`. Asks before it overwrites a disk that the machine has.

    Exit status: 0 QEMU was quit at its console, or the guest powered off; 1 no terminal, no window, or QEMU failed.
    Example: doit name=byhand install --display
    """
    flag = {"type": bool, "default": False}
    return {
        "actions": [action("vmtasks.tasks.actions.byhand:install")],
        "params": [
            {"name": "disk", "long": "disk", **flag, "help": "boot what was installed, not the installer"},
            DISPLAY_PARAM,
            {"name": "user", "long": "user", "type": str, "default": "root", "help": "guest user that the key is for"},
            YES_PARAM,
        ],
        "setup": ["fetch"],
        "io": {"capture": False},
    }


def task_provision() -> Task:
    """Run a phase's script on the running machine, over SSH: the last one, or the one that --phase says.

    Runs as root without a boot, and reports steps and status as a boot does. For trying changes of a script on a
    snapshot of your own, and for machines that were installed by hand. `.vm/run/<machine>/` has the log.

    Exit status: 0 its script exited with 0; 1 it failed, took too long, or the connection was lost; 2 no such phase.
    Example: doit restore --name mine start provision && doit stop && doit snapshot --name mine
    """
    return {
        "actions": [action("vmtasks.tasks.actions.byhand:run_phase")],
        "params": [
            {"name": "phase", "long": "phase", "type": int, "default": 0, "help": "number of the phase; 0: the last"}
        ],
        "setup": ["fetch"],
        "io": {"capture": False},
    }


def task_look() -> Iterator[Task]:
    """Boot a throw-away copy of the disk that a phase starts from, with the console here.

    Works also when nothing has failed. Leaves out the phase's CD, so that the phase does not run, unless --cd is given.
    --live boots the installer's live system with the disk attached, for a disk without a login. Ctrl-A X quits QEMU.

    Exit status: 0 QEMU was quit at its console, or the guest powered off; 1 no terminal, or QEMU failed.
    Example: doit look:2 --live
    """
    flag = {"type": bool, "default": False}
    for number, phase in enumerate(CONFIG.guest.phases, start=1):
        yield {
            "name": str(number),
            "doc": f"boot what {phase.name} starts from",
            "actions": [action("vmtasks.tasks.actions.byhand:look", number)],
            "params": [
                {"name": "cd", "long": "cd", **flag, "help": "attach the phase's CD: the phase runs, nothing is kept"},
                DISPLAY_PARAM,
                {"name": "live", "long": "live", **flag, "help": "boot the installer's live system, disk attached"},
            ],
            "task_dep": [f"phase_iso:{number}", f"phase:{number - 1}" if number > 1 else "fetch"],
            "io": {"capture": False},
        }
