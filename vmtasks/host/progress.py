"""Progress for the user: a live line on a terminal, plain lines elsewhere, durations of the last run."""

import codecs
import errno
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from vmtasks import printable
from vmtasks.errors import StateError
from vmtasks.host import files

Say = Callable[[str], None]
"""Receives a message for the user."""


class Step:
    """Work in progress. `now()` names the milestone it has reached."""

    def __init__(self, title: str, expected_s: float | None = None, observer: "Observer | None" = None) -> None:
        """`expected_s`: how many seconds this took last time, or None. `observer` receives milestones."""
        self.title = printable.line(title)
        self.expected_s = expected_s
        self.note = ""
        self.started = time.monotonic()
        self.milestones: list[tuple[str, float]] = []
        self._observer = observer

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started

    def now(self, note: str) -> None:
        """Report a milestone: the work that begins now."""
        self.note = printable.line(note)
        self.milestones.append((self.note, self.elapsed_s))
        if self._observer is not None:
            self._observer.milestone(self)

    def line(self) -> str:
        """`phase 1-install: Format the disk, 12 s of about 30 s`."""
        about = f" of about {seconds(self.expected_s)}" if self.expected_s else ""
        note = f": {self.note}" if self.note else ""
        return f"{self.title}{note}, {seconds(self.elapsed_s)}{about}"


class Observer:
    """Receives progress, notes and warnings. This one ignores them; pass your own to observing().

    It may be called from several threads. An exception that it raises ends the work.
    """

    def say(self, text: str) -> None:
        """A note, a warning or the end of a step: one line or a few."""

    def milestone(self, step: Step) -> None:
        """`step` has reached `step.note`."""

    def watching(self, _step: Step) -> AbstractContextManager[object]:
        """The context of a step: entered at its start, left at its end."""
        return nullcontext()


class Lines(Observer):
    """Passes each line to a function."""

    def __init__(self, to: Say) -> None:
        """`to` is called with each text."""
        self._to = to

    def say(self, text: str) -> None:
        """Pass it on."""
        self._to(text)

    def milestone(self, step: Step) -> None:
        """`title: note`."""
        self._to(f"{step.title}: {step.note}")


class CommandLine(Observer):
    """A terminal, where a live line shows the step; or a log, where milestones are lines."""

    def say(self, text: str) -> None:
        """Write `text` without control sequences, above the live line if there is one."""
        if _talk["stderr"]:
            to_stderr(text + "\n")
            return
        sys.stdout.write(printable.text(text) + "\n")
        sys.stdout.flush()

    def milestone(self, step: Step) -> None:
        """Write a line, unless a live line shows it."""
        if not is_terminal():
            self.say(f"{step.title}: {step.note}")

    def watching(self, step: Step) -> AbstractContextManager[object]:
        """Keep the live line up to date."""
        if not is_terminal():
            return nullcontext()
        from vmtasks.host.live import live_line  # noqa: PLC0415 - rich takes 60 ms

        return live_line(step.line, _stream(), write_or_drop, color=not no_color())


_default: list[Observer] = [Observer()]
_observer: ContextVar[Observer] = ContextVar("vmtasks observer")


def talk() -> None:
    """Make the command line's observer the default: called by a front end at its start."""
    _default[0] = CommandLine()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Set `observer` for the block, in this thread or task and in the threads that vmtasks starts for it."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observer() -> Observer:
    """The observer of this thread or task."""
    return _observer.get(_default[0])


def say(text: str) -> None:
    """Send the observer one line."""
    observer().say(text)


@contextmanager
def step(title: str, *, expected_s: float | None = None) -> Iterator[Step]:
    """Show `title` while the block runs, then how long it took, or that it failed and after how long."""
    told = observer()
    shown = Step(title, expected_s, told)
    try:
        with told.watching(shown):
            yield shown
    except BaseException:
        told.say(f"{title}: failed after {seconds(shown.elapsed_s)}")
        raise
    told.say(f"{title}: done in {seconds(shown.elapsed_s)}")


def confirm(question: str, otherwise: str, done: str = "removed") -> None:
    """Ask the user. StateError, that nothing was `done`, without a terminal or for an answer other than yes."""
    if not sys.stdin or sys.stdin.closed or not sys.stdin.isatty():
        raise StateError(f"nothing was {done}: there is no terminal to ask on", hint=otherwise)
    to_stderr(f"{question} [y/N] ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise StateError(f"nothing was {done}")


def accept_any_text() -> None:
    r"""Have standard output and error take any text, whatever their encoding: a path's odd bytes come out as they are.

    A character that the encoding lacks is shown by its number, as in `\u2713`.
    """
    codecs.register_error("vmtasks", _encoded)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vmtasks")


def _encoded(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    odd = error.object[error.start : error.end]
    shown = [
        bytes([ord(char) - 0xDC00])
        if 0xDC80 <= ord(char) <= 0xDCFF
        else char.encode("ascii", errors="backslashreplace")
        for char in odd
    ]
    return b"".join(shown), error.end


def to_stderr(text: str) -> None:
    """Write to stderr without control sequences; a closed one must not stop clean-up."""
    write_or_drop(sys.stderr, printable.text(text))


def write_or_drop(stream: TextIO, text: str) -> None:
    """Write to a stream, or drop the text if its reader is gone; later text is dropped too.

    Text left in the stream's buffer would make the interpreter exit with status 120.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPIPE):
            with suppress(OSError), Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), stream.fileno())
                stream.flush()


def open_streams() -> None:
    """Open closed descriptors 0, 1 and 2 on /dev/null, so that no file of ours becomes one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - the lowest that is free: `number`
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


def tell_notes(error: BaseException | None) -> None:
    """Report failures of clean-up after an interrupt, from the notes of `error` and of its causes."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            for note in getattr(error, "__notes__", ()):
                to_stderr(f"also: {note}\n")
        error = error.__cause__ or error.__context__


def talk_on_stderr() -> None:
    """As talk(), but on stderr: standard output is only for data."""
    talk()
    _talk["stderr"] = True


_talk = {"stderr": False}


def seconds(value: float) -> str:
    """4 -> '4.0 s', 75 -> '1 min 15 s', 7500 -> '2 h 5 min', 100000 -> '1 d 3 h'."""
    whole = round(value)
    if value < 10:
        return f"{value:.1f} s"
    if whole < 60:
        return f"{whole} s"
    for size, unit, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {part}"
    return f"{whole // 60} min {whole % 60} s"


def is_terminal() -> bool:
    """Whether live lines work: our output is a terminal that can move its cursor."""
    out = _stream()
    return (
        out is not None
        and out.isatty()
        and os.environ.get("TERM", "dumb") != "dumb"
        and threading.current_thread() is threading.main_thread()
    )


def _stream() -> TextIO | None:
    return sys.__stderr__ if _talk["stderr"] else sys.__stdout__


def no_color() -> bool:
    """Whether NO_COLOR is set to a non-empty value; see https://no-color.org."""
    return bool(os.environ.get("NO_COLOR"))


class History:
    """How long each piece of work took when it last succeeded; without a valid file there are no estimates."""

    def __init__(self, path: Path) -> None:
        """`path` is a JSON object: title -> seconds."""
        self.path = path

    def expected_s(self, key: str) -> float | None:
        """Seconds that `key` took last time, or None."""
        value = self._read().get(key)
        return float(value) if isinstance(value, int | float) else None

    def record(self, key: str, took_s: float) -> None:
        """Remember that `key` took `took_s` seconds."""
        with suppress(OSError):  # a full disk must not fail finished work
            files.write(self.path, json.dumps({**self._read(), key: round(took_s, 1)}, indent=1, sort_keys=True))

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(files.read(self.path))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}
