"""A person's, or a script's, session in a machine, on our own streams."""

from collections.abc import Sequence

from vmtasks import proc, progress
from vmtasks.remote import ssh
from vmtasks.session import health
from vmtasks.session.machine import Machine
from vmtasks.session.use import using


def log_in(
    machine: Machine, verb: str, line: str = "", *, options: Sequence[str] = (), shown: str = "", user: str = ""
) -> int:
    """Log in to a machine, or run a line of its login shell there; returns the line's status, 255 where ssh failed.

    `options` are ssh's. `verb`, `shown` and `user` are for the list of sessions and the log of those that have ended.
    Where ssh failed, and meanwhile when the guest stands still, stderr says why.
    """
    target = machine.wait()
    argv = target.argv(*([line] if line else []), options=options)
    with health.telling(machine, progress.say), using(machine, verb, shown, user) as outcome:
        # Options may ask for another user, or for a connection of its own.
        outcome.status = proc.attach(argv) if options else ssh.attach(target, argv)
    if outcome.status == ssh.FAILED and (why := health.is_alive(machine).reason):
        progress.say(f"error: {why}\nhint: vmtasks doctor {machine.name}")
    return outcome.status
