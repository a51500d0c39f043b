"""A program on a terminal of its own in the guest, driven from Python: type, read, resize.

Our own terminal, at which a person sits, goes through OpenSSH; see machines/login.py.
"""

import select
import time
from typing import Any, Self

from vmtasks.errors import CommandTimeoutError, ConnectionLostError
from vmtasks.guest.channels import BROKEN, exit_status

BLOCK = 32768
SEND_S = 30.0
LOGIN_SHELL = 'exec "${SHELL:-/bin/sh}" -l'


class Terminal:
    """A terminal in the guest. One thread may read while others type and resize.

    The guest sends SIGHUP to its programs when it is closed or the connection breaks.
    """

    def __init__(self, name: str, channel: Any) -> None:
        """Use Connection.open_terminal(). `name` is the machine's, for errors."""
        self._name = name
        self._channel = channel
        # read() waits by poll, not by the channel's timeout: send() sets that, in another thread.
        self._readable = select.poll()
        self._readable.register(channel.fileno(), select.POLLIN)

    def __enter__(self) -> Self:
        """Close it at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def send(self, data: str | bytes, *, timeout_s: float = SEND_S) -> None:
        """Type; Enter is a carriage return.

        CommandTimeoutError when nothing is read for `timeout_s`; a part may have been typed. ConnectionLostError.
        """
        try:
            self._channel.settimeout(timeout_s)
            self._channel.sendall(data.encode() if isinstance(data, str) else data)
        except TimeoutError:
            what = f"the terminal in {self._name} read nothing for {timeout_s:g} s; a part may have been typed"
            raise CommandTimeoutError(what, which="idle") from None
        except BROKEN as error:
            raise ConnectionLostError(f"the terminal in {self._name} is closed: nothing can be typed") from error

    def read(self, *, timeout_s: float) -> bytes:
        """The next output as soon as there is some; b"" once the program has ended and all is read.

        CommandTimeoutError after `timeout_s` without output; the program is not ended.
        """
        until = time.monotonic() + timeout_s
        while True:
            over = self._channel.eof_received or self._channel.closed  # checked before its last output
            if self._channel.recv_ready():
                return bytes(self._channel.recv(BLOCK))
            if over:
                return b""
            left_s = until - time.monotonic()
            if left_s <= 0:
                what = f"the terminal in {self._name} showed nothing for {timeout_s:g} s"
                raise CommandTimeoutError(what, which="idle")
            self._readable.poll(1 + left_s * 1000)

    def read_until(self, text: str, *, timeout_s: float) -> str:
        """Output up to the read that completes `text`. CommandTimeoutError, with what came, after `timeout_s`.

        ConnectionLostError, with what came, if the program ends before.
        """
        until, seen = time.monotonic() + timeout_s, b""
        while text.encode() not in seen:
            try:
                data = self.read(timeout_s=max(0.0, until - time.monotonic()))
            except CommandTimeoutError:
                what = f"the terminal in {self._name} did not show {text!r} within {timeout_s:g} s"
                raise CommandTimeoutError(what, which="overall", stdout=seen) from None
            if not data:
                raise ConnectionLostError(f"the terminal in {self._name} ended without showing {text!r}", stdout=seen)
            seen += data
        return seen.decode(errors="replace")

    def resize(self, columns: int, rows: int) -> None:
        """Set its size in characters; the guest sends SIGWINCH to the program in the foreground."""
        try:
            self._channel.resize_pty(columns, rows)
        except BROKEN as error:
            raise ConnectionLostError(f"the terminal in {self._name} is closed and has no size") from error

    def wait(self, *, timeout_s: float) -> int:
        """The program's status, 128 + N after signal N; discards its output.

        CommandTimeoutError after `timeout_s`. ConnectionLostError if the connection broke first.
        """
        until = time.monotonic() + timeout_s
        while self.read(timeout_s=max(0.0, until - time.monotonic())):
            pass
        self._channel.status_event.wait(max(0.1, until - time.monotonic()))
        ended = exit_status(self._channel)
        if ended is None:
            raise ConnectionLostError(f"the terminal in {self._name} closed; how its program ended is not known")
        return ended[0]

    def close(self) -> None:
        """Close it."""
        self._channel.close()
