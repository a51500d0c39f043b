"""Take over a machine's lock within seconds, even while another command waits for its guest."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from vmtasks.errors import BusyError
from vmtasks.host import progress
from vmtasks.host.locks import holder
from vmtasks.machines.folder import Place
from vmtasks.qemu import argv, vm

RELEASE_S = 3.0
"""How long the lock's holder may take to notice that the machine has ended."""
TERM_S = 5.0
"""How long a command may take to exit after SIGTERM."""


@contextmanager
def lock(place: Place) -> Iterator[str]:
    """Take the machine's exclusive lock; reports and ends a command that holds it.

    First cuts the machine's power, so that a command that waits for its guest gives up. Then signals a command that
    still holds the lock, identified by pid, start time and command line, and by its open lock file. Yields the rung
    that stopped the machine, '' if none was needed. BusyError for a holder that cannot be identified, or does not
    exit; MachineError for a QEMU that is not ours.
    """
    with ExitStack() as stack:
        if _try_lock(place, stack, 0):
            yield ""
            return
        progress.say(f"machine {place.name}: {_holder_name(place)} holds its lock; its power is cut")
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
    """Signal the lock's holder, if it can be identified. SIGCONT lets a stopped process handle the signal."""
    found = holder(place.lock_file)
    if found is None:
        return
    who = str(found)
    if found.signal(place.lock_file, number):
        found.signal(place.lock_file, signal.SIGCONT)
        progress.say(f"machine {place.name}: {who} still held it; {number.name} was sent")
