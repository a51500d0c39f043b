"""Actions for a person at the guest's console."""

from vmtasks.byhand import console, provision
from vmtasks.host import progress
from vmtasks.images.steps import Builder
from vmtasks.tasks.actions.machines import configured_machine
from vmtasks.tasks.context import CONFIG


def install(*, yes: bool, display: bool, disk: bool, user: str) -> None:
    """Boot the installer, or with `disk` what it has installed, with the console on this terminal."""
    window = console.window(wanted=display)
    if disk:
        console.go_on(Builder(CONFIG), display=window)
        return
    machine = configured_machine()
    if machine.place.disk.exists() and not yes:
        progress.confirm(f"Machine {machine.name} has a disk already. Install over it?", "doit install --yes")
    console.install(Builder(CONFIG), user=user, display=window)


def look(number: int, /, *, cd: bool, live: bool, display: bool) -> None:
    """Boot a copy of the disk that phase `number` starts from."""
    console.look(Builder(CONFIG), number, cd=cd, live=live, display=console.window(wanted=display))


def run_phase(*, phase: int) -> None:
    """Run the script of phase `phase` (0: the last) on the running machine."""
    log = provision.provision(CONFIG, phase)
    progress.say(f"log: {log}")
    progress.say("to keep what it did: doit stop, doit snapshot --name NAME")
