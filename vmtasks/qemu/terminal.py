"""Attach our terminal to a machine's serial console, in raw mode, until Ctrl-] or until either side ends."""

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
"""How long to wait for more output after the end of piped input."""


def attach_console(path: Path, name: str) -> None:
    """Copy bytes between our streams and the console's socket. MachineError when another client has the console.

    After the end of piped input, prints output until none comes for AFTER_END_S.
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
                raise MachineError("the console was closed: the machine has stopped, or another client has its console")
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
    """Put the terminal into raw mode: each key goes to the guest at once, Ctrl-C too."""
    if not os.isatty(source):
        yield
        return
    attributes = termios.tcgetattr(source)
    try:
        tty.setraw(source)
        yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, attributes)
        sys.stderr.write("\r\n")
