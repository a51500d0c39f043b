"""SIGINT, SIGTERM and SIGHUP as an exception that unwinds every `with` block: once, and never within an import.

Finally we die by that signal: only then does a shell that runs us in a loop end the loop. A second signal interrupts
optional clean-up; see cuttable().
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.02
SECOND_S = 0.3
"""A signal that comes sooner is a repetition: timeout(1), and a shell that loses its terminal, send two."""


class _Clean:
    """State of clean-up: the time of the first signal, whether a second came, and whether that may interrupt it."""

    began = 0.0
    hurry = False
    cuttable = False


def unwind_on_signals() -> list[int]:
    """Make the first of these signals raise KeyboardInterrupt in the main thread, and kill the process at exit.

    A second one interrupts clean-up only in a cuttable() block. An ignored signal stays ignored, for nohup(1). Returns
    a list that will contain the signal's number.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            # An interrupted import leaves a broken module, and clean-up may need it.
            later = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        if not caught:
            _Clean.began = time.monotonic()
            caught.append(number)
        elif time.monotonic() - _Clean.began < SECOND_S:
            return
        else:
            _Clean.hurry = True
            if not _Clean.cuttable:
                return
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    atexit.register(_die_of, caught)
    return caught


def _die_of(caught: list[int]) -> None:
    """Die by the received signal, if any: an exit status of 130 would tell a shell that we had handled it."""
    if not caught:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    signal.signal(caught[0], signal.SIG_DFL)
    os.kill(os.getpid(), caught[0])


def ignore() -> None:
    """Ignore these signals from now on."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def cuttable() -> Iterator[None]:
    """Let a second signal raise KeyboardInterrupt within the block, at once if it has come already.

    For clean-up that may take long and is optional, such as copying back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _Clean.hurry:
        raise KeyboardInterrupt
    before, _Clean.cuttable = _Clean.cuttable, True
    try:
        yield
    finally:
        _Clean.cuttable = before


@contextmanager
def deferred() -> Iterator[None]:
    """Defer signals while a resource exists that no clean-up handler owns yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for came in held:
            signal.raise_signal(came)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
