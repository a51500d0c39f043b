"""The guest's serial console: printable text, sentinel lines, prompts, and typing that a boot loader can follow."""

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
"""How much of the console an error shows."""

LOG_BYTES = 1 << 20

KEEP_LINES = 1000

KEEP_CHARS = 1 << 16
"""How much unmatched text is kept to look for prompts in."""

LOOK_BACK = 4096
"""The longest text before what is new in which a match may begin."""

KEY_DELAY_S = 0.03
"""Pause between typed characters: a BIOS keyboard buffer holds 15 keys, and loaders poll slowly under emulation."""

KILL_LINE = "\x15"
"""Ctrl-U: a loader that edits lines throws away what stands on its line; the others do nothing."""

LINE_TRIES, ENTER_TRIES = 8, 3
"""How often a line is typed that does not come back as it was, and Enter, when no new line comes."""

QUIET_S = 0.3
"""Without a word for so long, no echo of what was typed before is under way any more."""

_SENTINEL = re.compile(r"::vmtasks:([0-9a-f]{16}):(begin|step|hostkey|exit)(?: (.*))?")
_WRAPPER = re.compile(r"(?:exit|step|fail) |\. .*/phase\.sh$")
_TRACE = re.compile(r"\++ (\d*): (.*)")


@dataclass(frozen=True)
class Sentinel:
    """A line by which the phase's wrapper speaks to the host: `kind` is begin, step, hostkey or exit."""

    token: str
    kind: str
    text: str


class Transcript:
    """What the console has said: whole lines, the line under way, and text in which no prompt was found yet."""

    def __init__(self, keep: int | None = KEEP_LINES) -> None:
        """Empty, as before the machine starts. `keep` is how many lines are remembered; None: all."""
        self._cleaner = Cleaner()
        self._line = ""
        self._heard = 0
        self._searched: dict[str, int] = {}
        self.unmatched = ""
        self.lines: deque[str] = deque(maxlen=keep)
        self.last_command = ""

    def feed(self, data: bytes) -> list[Sentinel]:
        """Take in `data`; returns the sentinel lines that it completes."""
        text = self._cleaner.feed(data)
        self._heard += len(text)
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
                self._remember(line)
        return found

    def match(self, expression: str) -> bool:
        """Whether `expression` is found in the text since the last match; what is up to its end is then used up.

        What was searched before is not searched again: only what is new, the line that it goes on with, and the line
        before that.
        """
        fresh = self._heard - self._searched.get(expression, 0)
        if not fresh:
            return False
        self._searched[expression] = self._heard
        known = max(0, len(self.unmatched) - fresh)
        begin = self.unmatched.rfind("\n", 0, known) + 1
        begin = self.unmatched.rfind("\n", 0, max(0, begin - 1)) + 1
        found = re.compile(expression).search(self.unmatched, max(begin, known - LOOK_BACK))
        if found is not None:
            self.unmatched = self.unmatched[found.end() :]
            self._searched.clear()  # what follows is new to whoever asks for the same again
        return found is not None

    def tail(self, count: int = TAIL_LINES) -> list[str]:
        """The last lines that say something: no empty ones, no sentinels; the one under way included."""
        lines = [line for line in (*self.lines, self._line) if line.strip() and not parse_sentinel(line)]
        return lines[-count:]

    def _remember(self, line: str) -> None:
        """Keep what fail() said, or else the last command that the trace showed, for the account of a failure."""
        if line.startswith("FAILED: "):
            self.last_command = line.removeprefix("FAILED: ").strip()
            return
        trace = _TRACE.fullmatch(line.strip())
        if trace is not None and not _WRAPPER.match(trace[2]):
            self.last_command = f"line {trace[1]}: {trace[2]}" if trace[1] else trace[2]  # dash does not count lines


@dataclass
class ScriptReport:
    """What a phase's script has told the host: steps, host keys, exit status. Lines with another token do not count.

    `on_step` gets the title of each step. `status` is None until the script has ended.
    """

    token: str
    on_step: Callable[[str], None]
    transcript: Transcript = field(default_factory=Transcript)
    host_keys: list[str] = field(default_factory=list)
    step: str = ""
    status: int | None = None
    begun: bool = False

    def feed(self, data: bytes) -> None:
        """Take in what the guest has written."""
        for sentinel in self.transcript.feed(data):
            if sentinel.token == self.token:
                self._take(sentinel)

    def _take(self, sentinel: Sentinel) -> None:
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
        """` at step 'Format the disk'`, as a message goes on; empty before the first step."""
        return f" at step '{self.step}'" if self.step else ""

    @property
    def exit_text(self) -> str:
        """`its script exited with 1 (line 12: false)`."""
        last = f" ({self.transcript.last_command})" if self.transcript.last_command else ""
        return f"its script exited with {self.status}{last}"


def parse_sentinel(line: str) -> Sentinel | None:
    """The sentinel that `line` is; None when it is anything else, an echo of the script included."""
    found = _SENTINEL.fullmatch(line.rstrip())
    return Sentinel(found[1], found[2], found[3] or "") if found else None


def read_log(path: Path, start: int = 0) -> Transcript:
    """The transcript of a recorded console from byte `start`, at most its last MiB; empty where there is none."""
    transcript = Transcript()
    with contextlib.suppress(OSError), files.opened(path) as console:
        console.seek(max(start, path.stat().st_size - LOG_BYTES))
        transcript.feed(console.read(LOG_BYTES))
    return transcript


class Echo:
    """What has come back of a line that is being typed."""

    def __init__(self, line: str) -> None:
        """`line` is what is going to be typed, without Enter."""
        self._line = line
        self._cleaner = Cleaner()
        self.text = ""

    @property
    def last(self) -> str:
        """The line that the other side is at."""
        return self.text.rpartition("\n")[2]

    def feed(self, data: bytes) -> None:
        """Take in what was read."""
        self.text += self._cleaner.feed(data)

    def matches(self, count: int) -> bool:
        """Whether the first `count` characters have come back, once or twice each, and nothing else."""
        wanted = self._line[:count]
        return self.last in (wanted, _twice(wanted))

    def can_match(self) -> bool:
        """Whether what has come back can still become the line."""
        return self._line.startswith(self.last) or _twice(self._line).startswith(self.last)


def _twice(text: str) -> str:
    """As it looks on a serial line to which the firmware copies the screen that the loader writes to as well."""
    return "".join(character * 2 for character in text)


def readable(descriptors: Sequence[int], timeout_s: float) -> list[int]:
    """Which of these descriptors can be read without waiting, or are at their end; waits at most `timeout_s` for one.

    Not select(2), which knows no descriptor above 1023.
    """
    ready = select.poll()
    for descriptor in descriptors:
        ready.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in ready.poll(max(0.0, timeout_s) * 1000)]


class Serial:
    """The socket behind COM1. QEMU records it to a file on its own; this is for reading along and typing."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection` is connected."""
        self._socket = connection
        self._closed = False

    def read(self, timeout_s: float) -> bytes:
        """What has come, after waiting at most `timeout_s`; empty when nothing did or the other side is gone."""
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
        """Type `data` at once. OSError when the other side is gone."""
        self._socket.sendall(data)

    def type(self, text: str) -> Iterator[bytes]:
        """Type `text` a character at a time; gives what the guest says meanwhile."""
        for character in text:
            with contextlib.suppress(OSError):
                self._socket.sendall(character.encode())
            until = time.monotonic() + KEY_DELAY_S
            while (left := until - time.monotonic()) > 0:
                yield self.read(left)

    def type_line(self, line: str, *, clean: bool, patience_s: float, timeout_s: float) -> Iterator[bytes]:
        """Type `line`, each character when the one before has come back, and then Enter.

        `clean`: nothing stands on the other side's line yet. Only a line on which something stands is thrown away
        first: whether a loader knows that key is not certain, and a plain line needs it not.

        Gives what the guest says meanwhile, and empty bytes while it says nothing. A line is thrown away and typed anew
        when something else came back, or nothing within `patience_s`. MachineError after `timeout_s`, or when nothing
        helped; Enter is never typed after a line that did not come back whole.
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
        """Type the characters of `line` one after the other, as long as each comes back.

        One that does not is not typed again: whether it got lost, or only its echo, cannot be known.
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
        """Read until nothing has come for a while."""
        quiet = time.monotonic()
        while (now := time.monotonic()) - quiet < QUIET_S and now < deadline:
            data = self.read(KEY_DELAY_S)
            echo.feed(data)
            quiet = now if data else quiet
            yield data


@contextlib.contextmanager
def connect(path: Path, *, timeout_s: float, ended: Callable[[], bool] = lambda: False) -> Iterator[Serial]:
    """Open the console's socket, which QEMU makes soon after it starts. MachineError when it does not or has ended."""
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
