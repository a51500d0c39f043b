"""Reads both streams of a running command as they come, with deadlines and without polling."""

import contextlib
import select
import threading
import time
from typing import Any, BinaryIO, Literal

from vmtasks.guest.command import Header, Lines, OnData, OnLine, Stream

BLOCK = 1 << 16
StopReason = Literal["ended", "overall", "idle"]


class Pump:
    """Reads the output of one channel, passes it on, and keeps it unless `keep` is False."""

    def __init__(
        self,
        channel: Any,
        token: str,
        *,
        header_lines: int = 1,
        on_line: OnLine | None = None,
        on_data: OnData | None = None,
        keep: bool = True,
    ) -> None:
        """`channel` is paramiko's; `token` is the command's, whose header lines are stripped from stderr."""
        self.header = Header(token, header_lines)
        self._channel = channel
        self._keep = keep
        self._on_data = on_data
        self._kept: dict[Stream, list[bytes]] = {"stdout": [], "stderr": []}
        self._lines = {name: Lines(name, on_line) for name in self._kept} if on_line else {}
        self._last_output = time.monotonic()

    @property
    def stdout(self) -> bytes:
        """The output kept so far."""
        return b"".join(self._kept["stdout"])

    @property
    def stderr(self) -> bytes:
        """The error output kept so far."""
        return b"".join(self._kept["stderr"])

    def until_end(self, deadline: float, idle_s: float | None = None, *, detached: bytes = b"") -> StopReason:
        """Pass on output until the command ends, the monotonic time `deadline`, or `idle_s` of silence.

        "ended" means that both streams are closed and the status has come, or that the channel is gone. A command
        that prints `detached` last counts as ended once it closes its streams.
        """
        ready = select.poll()
        ready.register(self._channel.fileno(), select.POLLIN)
        self._last_output = time.monotonic()
        while True:
            last = self._channel.eof_received or self._channel.closed  # checked before reading its last output
            self._drain()
            if last:
                break
            late = self._expired(deadline, idle_s)
            if late:
                return late
            ready.poll(1 + self._remaining_s(deadline, idle_s) * 1000)
        if detached and self.stdout.endswith(detached):
            return "ended"
        while not self._channel.status_event.wait(self._remaining_s(deadline, idle_s)):
            if late := self._expired(deadline, idle_s):
                return late
        self._drain()
        return "ended"

    def finish(self) -> None:
        """Pass on the bytes held back: a last line without a line feed, and stderr of a command that never ran."""
        self._deliver(self.header.rest(), "stderr")
        for lines in self._lines.values():
            lines.end()

    def _remaining_s(self, deadline: float, idle_s: float | None) -> float:
        until = deadline if idle_s is None else min(deadline, self._last_output + idle_s)
        return max(0.0, until - time.monotonic())

    def _expired(self, deadline: float, idle_s: float | None) -> Literal["", "overall", "idle"]:
        now = time.monotonic()
        if now >= deadline:
            return "overall"
        return "idle" if idle_s is not None and now >= self._last_output + idle_s else ""

    def _drain(self) -> None:
        channel = self._channel
        while channel.recv_ready() or channel.recv_stderr_ready():
            if channel.recv_ready():
                self._deliver(channel.recv(BLOCK), "stdout")
            if channel.recv_stderr_ready():
                self._deliver(self.header.feed(channel.recv_stderr(BLOCK)), "stderr")
            self._last_output = time.monotonic()

    def _deliver(self, data: bytes, stream: Stream) -> None:
        if not data:
            return
        if self._keep:
            self._kept[stream].append(data)
        if self._on_data:
            self._on_data(data, stream)
        if self._lines:
            self._lines[stream].feed(data)


def feed(channel: Any, preamble: bytes, stdin: bytes | BinaryIO) -> threading.Thread | None:
    """Write a command's input in a thread, so that reading its output cannot deadlock."""

    def send() -> None:
        # A command may end before it has read everything; the channel then raises OSError.
        with contextlib.suppress(OSError, EOFError):
            channel.sendall(preamble)
            if isinstance(stdin, bytes):
                channel.sendall(stdin)
            else:
                while block := stdin.read(BLOCK):
                    channel.sendall(block)
            channel.shutdown_write()

    if not preamble and stdin == b"":
        return None  # it reads from /dev/null
    thread = threading.Thread(target=send, name="vmtasks stdin", daemon=True)
    thread.start()
    return thread
