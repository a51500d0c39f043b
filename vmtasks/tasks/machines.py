"""Tasks about machines: start, stop, status, ssh, snapshot, restore, destroy, check_prereqs, help_vars."""

from functools import cache
from typing import Any

from vmtasks.images.workspace import Workspace
from vmtasks.tasks.context import CONFIG, action, option_given
from vmtasks.tasks.images import step_up_to_date, without_option
from vmtasks.tasks.reporter import LazyText

Task = dict[str, Any]
ACTIONS = "vmtasks.tasks.actions.machines:"
NAME_PARAM = {"name": "name", "long": "name", "short": "n", "type": str, "default": "", "help": "name of a snapshot"}
YES_PARAM = {"name": "yes", "long": "yes", "short": "y", "type": bool, "default": False, "help": "do not ask"}


def task_snapshot() -> Task:
    """Name the finished image `clean`; with --name, save the stopped machine's disk under that name.

    A saved snapshot needs no other image, so that a snapshot saved from it later leaves it as it is. The machine must
    be stopped, because a running guest's disk is inconsistent. Replaces a snapshot of the same name.

    Exit status: 0 saved; 1 the machine runs or has no disk, or a phase failed; 2 not a valid name.
    Example: doit stop && doit snapshot --name before-upgrade
    """
    state, last = Workspace(CONFIG), len(CONFIG.guest.phases)
    # Saving a machine's disk must not build stale phases.
    needs = [] if option_given("snapshot", "--name") else [f"phase:{last}"]
    return {
        "actions": [action(f"{ACTIONS}snapshot")],
        "task_dep": needs,
        "targets": [str(state.clean_record)],
        "uptodate": [step_up_to_date("snapshot"), without_option("name")],
        "params": [NAME_PARAM],
        "meta": {
            "fresh": LazyText(lambda: f"{CONFIG.label}: the clean image is up to date"),
            "reads": [str(state.record(last))],
        },
        "io": {"capture": False},
    }


def task_start() -> Task:
    """Start the machine, and wait until SSH answers.

    Ready means that a login has succeeded. Leaves a running machine alone. Makes it again, with a message, when its
    image was rebuilt; refuses one of another guest or version. After a failure, ends QEMU and shows the last console
    lines.

    Exit status: 0 SSH answers; 1 it does not, or the port is taken; 2 wrong configuration.
    Example: doit name=second port=auto memory=2G cpus=4 start
    """
    return {"actions": [action(f"{ACTIONS}start")], "task_dep": images_needed(), "io": {"capture": False}}


@cache
def images_needed() -> list[str]:
    """Tasks that must run before the machine can start: none if it was installed or its snapshot saved by hand."""
    return ["snapshot"] if Workspace(CONFIG).on_clean(CONFIG.name) else []


def task_stop() -> Task:
    """Stop the machine: power off in the guest first, harder only if that fails.

    Then the ACPI power button, QMP quit, SIGTERM, SIGKILL, each with a deadline; prints which was needed. Signals only
    a process that is provably this machine's QEMU.

    Exit status: 0 it is stopped; 1 there is no such machine.
    Example: doit name=second stop
    """
    return {"actions": [action(f"{ACTIONS}stop")], "io": {"capture": False}}


def task_restore() -> Task:
    """Restore the clean snapshot, or the one that --name says; discards what the machine has written.

    Copies nothing: the disk becomes an empty overlay on the snapshot. Stops a running machine first.

    Exit status: 0 restored; 1 no such snapshot (the message lists those that exist).
    Example: doit restore --name before-upgrade && doit start
    """
    return {"actions": [action(f"{ACTIONS}restore")], "params": [NAME_PARAM], "io": {"capture": False}}


def task_destroy() -> Task:
    """Remove the machine and its disk; asks first, unless --yes is given.

    Images, snapshots, the installer and the keys stay. Without a terminal it needs --yes.

    Exit status: 0 it is removed, or did not exist; 1 nothing was removed.
    Example: doit name=second destroy --yes
    """
    return {"actions": [action(f"{ACTIONS}destroy")], "params": [YES_PARAM], "io": {"capture": False}}


def task_ssh() -> Task:
    """Log in to the running machine.

    The same as `ssh -F .vm/run/<machine>/ssh_config <machine>`; scp, sftp, rsync and git can use that file too.

    Exit status: that of the login shell; 1 the machine does not run; 255 ssh failed.
    Example: doit name=second ssh
    """
    return {"actions": [action(f"{ACTIONS}login")], "io": {"capture": False}}


def task_status() -> Task:
    """Say what the machine is doing: running, booting, stopped and so on, also by exit status.

    Stale: it ended without being stopped. Unreachable: SSH has answered before, and does not now. Changes nothing and
    takes no lock, so that it works while another command uses the machine.

    Exit status: 0 running, SSH answers; 11 booting; 4 stopped; 5 stale; 6 absent; 7 unreachable; 8 paused; 9 panicked;
    10 its record cannot be read; 2 wrong configuration.
    Example: doit status || doit start
    """
    return {"actions": [action(f"{ACTIONS}status")], "io": {"capture": False}}


def task_check_prereqs() -> Task:
    """Check that all programs are installed, that the accelerator works, and that there is space.

    Prints the path of each program, or the command that installs it. Tests the accelerator with real work: KVM that
    opens may still hang.

    Exit status: 0 nothing is missing; 1 something is.
    Example: doit check_prereqs
    """
    return {"actions": [action(f"{ACTIONS}check_prereqs")], "io": {"capture": False}}


def task_help_vars() -> Task:
    """List the variables that can be given as NAME=VALUE or in the environment, with their values.

    Also shows where each value comes from. Precedence: NAME=VALUE, the environment, vm.toml, guest.toml.

    Exit status: 0; 2 wrong configuration.
    Example: doit version=6.4.0 help_vars
    """
    return {"actions": [action(f"{ACTIONS}help_vars")], "io": {"capture": False}}
