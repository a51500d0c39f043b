"""Our terminal on a machine's serial console: raw, both ways, until Ctrl-] or the end of either side."""

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from vmtasks.errors import MachineError
from vmtasks.qemu import console

DETACH = b"\x1d"
AFTER_END_S = 2.0
"""How long answers to piped input may take to begin, or to go on."""


def attach_console(path: Path, name: str) -> None:
    """Pass bytes between our streams and the console's socket. MachineError when somebody else has the console.

    At the end of input that is no terminal, what still comes within two seconds is shown.
    """
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    with console.connect(path, timeout_s=3) as serial, _raw(source):
        if os.isatty(source):
            sys.stderr.write(f"console of {name}; Ctrl-] detaches\r\n")
            sys.stderr.flush()
        _pump(serial, source, sink)


def _pump(serial: console.Serial, source: int, sink: int) -> None:
    reading = True
    while True:
        ready = console.readable([serial.fileno(), *([source] if reading else [])], AFTER_END_S)
        if not ready and not reading:
            return
        if serial.fileno() in ready:
            data = serial.read(0)
            if not data:
                raise MachineError("the console was closed: the machine has ended, or somebody else has its console")
            _write(sink, data)
        if source in ready:
            typed = os.read(source, 1024)
            reading = bool(typed)
            before, detach, _ = typed.partition(DETACH)
            serial.send(before)
            if detach and os.isatty(source):
                return


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]


@contextlib.contextmanager
def _raw(source: int) -> Iterator[None]:
    """Each key goes to the guest at once, Ctrl-C too."""
    if not os.isatty(source):
        yield
        return
    before = termios.tcgetattr(source)
    try:
        tty.setraw(source)
        yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
        sys.stderr.write("\r\n")
