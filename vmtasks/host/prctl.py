"""Settings of a child in the kernel before exec: to end with its parent, to be unprivileged. Linux only."""

import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITIES = 64
"""More than exist: dropping an unknown one fails and changes nothing."""


def before_exec(*, die_with_us: bool, unprivileged: bool = False) -> Callable[[], None] | None:
    """The function for `preexec_fn`; None if there is nothing to set, or on other systems than Linux.

    `die_with_us`: the kernel sends the child SIGKILL when the thread that started it ends, however that happens.
    `unprivileged`: the program has no capability and can gain none, also for root. See prctl(2) and capabilities(7).
    Both survive exec; a change of the user id would undo the first, so the child keeps its user.
    """
    if sys.platform != "linux" or not (die_with_us or unprivileged):
        return None
    import ctypes  # noqa: PLC0415 - costs a run that starts nothing 4 ms

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        if unprivileged:
            for capability in range(CAPABILITIES):
                prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if die_with_us:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # the parent died between fork and prctl
                os._exit(1)

    return ask
