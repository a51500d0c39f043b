"""The signals that ask us to end, as an exception that unwinds every `with` block: once, and never within an import."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.02


def unwind_on_signals() -> list[int]:
    """Have the first of these signals raise KeyboardInterrupt in the main thread, and nothing interrupt what follows.

    One that is ignored stays so, as nohup(1) wants it. Returns the list that will hold the number of what has come.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            # A module that was cut short stays broken, and what undoes our work may need it.
            later = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        ignore()
        caught.append(number)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    return caught


def ignore() -> None:
    """Nothing may interrupt us from now on."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def whole() -> Iterator[None]:
    """Hold back what these signals would raise, for a moment in which something is there that nobody could undo yet."""
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
