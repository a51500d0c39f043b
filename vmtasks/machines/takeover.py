"""Break in: hold a machine's lock within seconds, also while another command waits for its guest."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from vmtasks.errors import BusyError
from vmtasks.host import progress
from vmtasks.host.locks import holder
from vmtasks.machines.folder import Place
from vmtasks.qemu import argv, vm

RELEASE_S = 3.0
"""How long who is at work may take to notice that the machine has ended."""
TERM_S = 5.0
"""How long a command may take to end in good order."""


@contextmanager
def lock(place: Place) -> Iterator[str]:
    """Be the only command at work on the machine; whoever is it now must end, and that is said.

    First the machine's power is cut, so that who waits for its guest gives up by itself. A command that still holds
    the lock is ended: it is known by its number, start and command line, and has the lock file open. Gives the rung
    that ended the machine, or nothing when none was needed. BusyError for a holder that cannot be proven, or does not
    end; MachineError for a QEMU that is not ours to end.
    """
    with ExitStack() as stack:
        if _try_lock(place, stack, 0):
            yield ""
            return
        progress.say(f"machine {place.name}: {_holder_name(place)} is at work on it; its power is cut")
        rung = _cut_power(place)
        for patience_s, number in ((RELEASE_S, signal.SIGTERM), (TERM_S, signal.SIGKILL)):
            if _try_lock(place, stack, patience_s):
                break
            _end(place, number)
        else:
            stack.enter_context(place.lock(TERM_S, say=False))
        yield rung


def _try_lock(place: Place, stack: ExitStack, timeout_s: float) -> bool:
    with suppress(BusyError):
        stack.enter_context(place.lock(timeout_s, say=False))
        return True
    return False


def _holder_name(place: Place) -> str:
    found = holder(place.lock_file)
    return str(found) if found is not None and found.holds(place.lock_file) else "another command"


def _cut_power(place: Place) -> str:
    pid = place.process()
    return "" if pid is None else vm.stop(pid, argv.PROGRAM, [], place.qmp)


def _end(place: Place, number: signal.Signals) -> None:
    """Signal who holds the lock, if that is provable. One that is stopped goes on, to end in good order."""
    found = holder(place.lock_file)
    if found is None:
        return
    who = str(found)
    if found.signal(place.lock_file, number):
        found.signal(place.lock_file, signal.SIGCONT)
        progress.say(f"machine {place.name}: {who} still held it; {number.name} was sent")
