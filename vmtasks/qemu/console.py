"""The guest's serial console: printable text, sentinel lines, prompts, and typing slow enough for boot loaders."""

import contextlib
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmtasks.errors import MachineError
from vmtasks.host import files
from vmtasks.printable import Cleaner

TAIL_LINES = 30
"""Console lines that an error shows."""

LOG_BYTES = 1 << 20

KEEP_LINES = 1000

KEEP_CHARS = 1 << 16
"""Unmatched text that is kept for prompt matching."""

LOOK_BACK = 4096
"""A match may begin at most this far before the new text."""

KEY_DELAY_S = 0.03
"""Pause between typed characters: a BIOS keyboard buffer holds 15 keys, and loaders poll slowly under emulation."""

KILL_LINE = "\x15"
"""Ctrl-U: clears the line of a loader that edits lines; the others ignore it."""

LINE_TRIES, ENTER_TRIES = 8, 3
"""Tries for a line that is not echoed correctly, and for Enter when no new line comes."""

QUIET_S = 0.3
"""After this long without output, all echoes of earlier typing have arrived."""

_SENTINEL = re.compile(r"::vmtasks:([0-9a-f]{16}):(begin|step|hostkey|exit)(?: (.*))?")
_WRAPPER = re.compile(r"(?:exit|step|fail) |\. .*/phase\.sh$")
_TRACE = re.compile(r"\++ (\d*): (.*)")


@dataclass(frozen=True)
class Sentinel:
    """A message of the phase's wrapper to the host: `kind` is begin, step, hostkey or exit."""

    token: str
    kind: str
    text: str


class Transcript:
    """The console's output: complete lines, the incomplete last line, and text that no prompt has matched yet."""

    def __init__(self, keep: int | None = KEEP_LINES) -> None:
        """Start empty. `keep` is how many lines to keep; None: all."""
        self._cleaner = Cleaner()
        self._line = ""
        self._received = 0
        self._searched: dict[str, int] = {}
        self.unmatched = ""
        self.lines: deque[str] = deque(maxlen=keep)
        self.last_command = ""

    def feed(self, data: bytes) -> list[Sentinel]:
        """Add `data`; returns the sentinel lines that it completes."""
        text = self._cleaner.feed(data)
        self._received += len(text)
        self.unmatched = (self.unmatched + text)[-KEEP_CHARS:]
        *whole, self._line = (self._line + text).split("\n")
        self._line = self._line[-KEEP_CHARS:]
        found = []
        for line in whole:
            self.lines.append(line)
            sentinel = parse_sentinel(line)
            if sentinel is not None:
                found.append(sentinel)
            else:
                self._note_command(line)
        return found

    def match(self, expression: str) -> bool:
        """Whether `expression` matches the text since the last match; consumes the text up to the end of the match.

        Searches only text that is new for this expression, the line that it continues, and the line before.
        """
        fresh = self._received - self._searched.get(expression, 0)
        if not fresh:
            return False
        self._searched[expression] = self._received
        known = max(0, len(self.unmatched) - fresh)
        begin = self.unmatched.rfind("\n", 0, known) + 1
        begin = self.unmatched.rfind("\n", 0, max(0, begin - 1)) + 1
        found = re.compile(expression).search(self.unmatched, max(begin, known - LOOK_BACK))
        if found is not None:
            self.unmatched = self.unmatched[found.end() :]
            self._searched.clear()  # for every expression, all that follows is new
        return found is not None

    def tail(self, count: int = TAIL_LINES) -> list[str]:
        """The last lines without empty ones and sentinels, including the incomplete one."""
        lines = [line for line in (*self.lines, self._line) if line.strip() and not parse_sentinel(line)]
        return lines[-count:]

    def _note_command(self, line: str) -> None:
        """Remember fail()'s message, or else the last command that `set -x` showed, to explain a failure."""
        if line.startswith("FAILED: "):
            self.last_command = line.removeprefix("FAILED: ").strip()
            return
        trace = _TRACE.fullmatch(line.strip())
        if trace is not None and not _WRAPPER.match(trace[2]):
            self.last_command = f"line {trace[1]}: {trace[2]}" if trace[1] else trace[2]  # dash does not count lines


@dataclass
class ScriptReport:
    """What a phase's script has reported: steps, host keys, exit status. Ignores sentinels with another token.

    `on_step` gets the title of each step. `status` is None until the script has exited.
    """

    token: str
    on_step: Callable[[str], None]
    transcript: Transcript = field(default_factory=Transcript)
    host_keys: list[str] = field(default_factory=list)
    step: str = ""
    status: int | None = None
    begun: bool = False

    def feed(self, data: bytes) -> None:
        """Add console output."""
        for sentinel in self.transcript.feed(data):
            if sentinel.token == self.token:
                self._handle(sentinel)

    def _handle(self, sentinel: Sentinel) -> None:
        match sentinel.kind:
            case "begin":
                self.begun = True
                self.on_step("the script runs")
            case "step":
                self.step = sentinel.text
                self.on_step(sentinel.text)
            case "hostkey" if sentinel.text not in self.host_keys:
                self.host_keys.append(sentinel.text)
            case "exit" if self.status is None:
                status, _, step = sentinel.text.partition(" ")
                if status.isdecimal():
                    self.status, self.step = int(status), step or self.step

    @property
    def at_step(self) -> str:
        """The end of a message: ` at step 'Format the disk'`; '' before the first step."""
        return f" at step '{self.step}'" if self.step else ""

    @property
    def exit_text(self) -> str:
        """`its script exited with 1 (line 12: false)`."""
        last = f" ({self.transcript.last_command})" if self.transcript.last_command else ""
        return f"its script exited with {self.status}{last}"


def parse_sentinel(line: str) -> Sentinel | None:
    """Parse a sentinel line; None for any other line, also for an echo of the script."""
    found = _SENTINEL.fullmatch(line.rstrip())
    return Sentinel(found[1], found[2], found[3] or "") if found else None


def read_log(path: Path, start: int = 0) -> Transcript:
    """Read a console log from byte `start`, at most its last MiB; empty if there is no log."""
    transcript = Transcript()
    with contextlib.suppress(OSError), files.opened(path) as console:
        console.seek(max(start, path.stat().st_size - LOG_BYTES))
        transcript.feed(console.read(LOG_BYTES))
    return transcript


class Echo:
    """The echo of a line that is being typed."""

    def __init__(self, line: str) -> None:
        """`line`: the line without Enter."""
        self._line = line
        self._cleaner = Cleaner()
        self.text = ""

    @property
    def last(self) -> str:
        """The incomplete last line."""
        return self.text.rpartition("\n")[2]

    def feed(self, data: bytes) -> None:
        """Add what was read."""
        self.text += self._cleaner.feed(data)

    def matches(self, count: int) -> bool:
        """Whether exactly the first `count` characters were echoed, once or twice each."""
        wanted = self._line[:count]
        return self.last in (wanted, _twice(wanted))

    def can_match(self) -> bool:
        """Whether the echo so far is a prefix of the line."""
        return self._line.startswith(self.last) or _twice(self._line).startswith(self.last)


def _twice(text: str) -> str:
    """The echo on a serial line that the loader writes to and the firmware copies the screen to."""
    return "".join(character * 2 for character in text)


def readable(descriptors: Sequence[int], timeout_s: float) -> list[int]:
    """The descriptors that are readable or at their end, after waiting at most `timeout_s` for one.

    Uses poll(2), because select(2) does not support descriptors above 1023.
    """
    ready = select.poll()
    for descriptor in descriptors:
        ready.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in ready.poll(max(0.0, timeout_s) * 1000)]


class Serial:
    """The socket of COM1, for reading and typing. QEMU logs the console itself."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection` is connected."""
        self._socket = connection
        self._closed = False

    def read(self, timeout_s: float) -> bytes:
        """Read output, after waiting at most `timeout_s`; b'' when there is none or the socket was closed."""
        if self._closed:
            time.sleep(timeout_s)
            return b""
        if not readable([self._socket.fileno()], timeout_s):
            return b""
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            data = b""
        self._closed = not data
        return data

    def fileno(self) -> int:
        """For poll()."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Send `data` at once. OSError when the socket was closed."""
        self._socket.sendall(data)

    def type(self, text: str) -> Iterator[bytes]:
        """Type `text` one character at a time; yields the guest's output."""
        for character in text:
            with contextlib.suppress(OSError):
                self._socket.sendall(character.encode())
            until = time.monotonic() + KEY_DELAY_S
            while (left := until - time.monotonic()) > 0:
                yield self.read(left)

    def type_line(self, line: str, *, clean: bool, patience_s: float, timeout_s: float) -> Iterator[bytes]:
        """Type `line`, each character after the echo of the one before, and then Enter.

        `clean`: the loader's line is empty. Otherwise clears it first with Ctrl-U, which not every loader supports.

        Yields the guest's output, and b'' while there is none. Clears and types the line again when the echo is wrong,
        or does not come within `patience_s`. MachineError after `timeout_s`, or after LINE_TRIES; never types Enter
        after a line that was not echoed completely.
        """
        deadline = time.monotonic() + timeout_s
        echo = Echo(line)
        for _ in range(LINE_TRIES):
            if time.monotonic() > deadline:
                break
            stray = Echo(line)
            yield from self._read_until_quiet(stray, deadline)
            if stray.text or not clean:
                yield from self._key(KILL_LINE, Echo(line), lambda: False, min(patience_s, QUIET_S))
            clean = False
            echo = Echo(line)
            yield from self._keys(line, echo, patience_s, deadline)
            if not echo.matches(len(line)):
                yield from self._read_until_quiet(echo, deadline)
                continue
            lines = echo.text.count("\n")
            for _ in range(ENTER_TRIES):
                yield from self._key("\r", echo, lambda: echo.text.count("\n") > lines, patience_s)  # noqa: B023
                if echo.text.count("\n") > lines:
                    return
            raise MachineError(f"{line!r} was typed, but Enter had no effect")
        raise MachineError(f"{line!r} was typed, and {echo.last!r} came back")

    def _keys(self, line: str, echo: Echo, patience_s: float, deadline: float) -> Iterator[bytes]:
        """Type the characters of `line` while each is echoed.

        Does not retype one that is not: whether the character was lost or only its echo is unknown.
        """
        for count, character in enumerate(line, 1):
            yield from self._key(character, echo, lambda: echo.matches(count) or not echo.can_match(), patience_s)  # noqa: B023
            if not echo.matches(count) or time.monotonic() > deadline:
                return

    def _key(self, key: str, echo: Echo, done: Callable[[], bool], timeout_s: float) -> Iterator[bytes]:
        """Send one key and read until `done`, or for `timeout_s`."""
        with contextlib.suppress(OSError):
            self._socket.sendall(key.encode())
        until = time.monotonic() + timeout_s
        while not done() and (left := until - time.monotonic()) > 0:
            data = self.read(min(left, KEY_DELAY_S))
            echo.feed(data)
            yield data

    def _read_until_quiet(self, echo: Echo, deadline: float) -> Iterator[bytes]:
        """Read until nothing has come for QUIET_S."""
        quiet = time.monotonic()
        while (now := time.monotonic()) - quiet < QUIET_S and now < deadline:
            data = self.read(KEY_DELAY_S)
            echo.feed(data)
            quiet = now if data else quiet
            yield data


@contextlib.contextmanager
def connect(path: Path, *, timeout_s: float, ended: Callable[[], bool] = lambda: False) -> Iterator[Serial]:
    """Connect to the console's socket once QEMU has created it. MachineError after `timeout_s`, or when `ended`."""
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                connection.connect(str(path))
                break
            except OSError as error:
                if ended() or time.monotonic() > deadline:
                    raise MachineError(f"QEMU did not open its console within {timeout_s:g} s ({error})") from None
                time.sleep(0.02)
        yield Serial(connection)
    finally:
        connection.close()
