"""The channels of one connection, and a shell that is started ahead for the next command.

Starting a shell is most of the cost of a short command in an emulated guest. So the next command's shell is started as
soon as a command has ended, in the login user's environment and home. It exits if it is not needed soon.
"""

import contextlib
import secrets
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import paramiko

from vmtasks.errors import CommandTimeoutError, ConnectionLostError, SshError
from vmtasks.guest import command as commands
from vmtasks.guest import login
from vmtasks.guest.command import Via
from vmtasks.guest.transport import Transport

BROKEN = (paramiko.SSHException, OSError, EOFError)
"""What paramiko raises when a connection breaks or a request is refused."""

MAX_UNFINISHED = 6
"""How many abandoned commands may keep their channels. OpenSSH's server allows 10 on a connection: MaxSessions."""

OPEN_S = 10.0
SHELL_MAX_AGE_S = 20.0
"""The maximum age of a waiting shell: it does not see later changes to the login, such as groups."""


def exit_status(channel: Any) -> tuple[int, str] | None:
    """How a channel's command ended: its status, and the name of the signal that ended it or ''. None: not known."""
    if channel.exit_status >= 0:
        return int(channel.exit_status), ""
    name = getattr(channel, "exit_signal", "")
    return (128 + getattr(signal.Signals, f"SIG{name}", 0), name) if name else None


class NotStartedError(SshError):
    """The server closed a channel before it accepted the command."""


@dataclass(frozen=True)
class WaitingShell:
    """A shell that waits on a channel. Its first line on stderr holds the token."""

    channel: Any
    token: str
    since: float = field(default_factory=time.monotonic)

    def is_usable(self) -> bool:
        """Whether it still waits, and is not too old."""
        over = self.channel.closed or self.channel.eof_received or self.channel.status_event.is_set()
        return not over and time.monotonic() - self.since < SHELL_MAX_AGE_S


class Channels:
    """The channels of a connection. Thread-safe."""

    def __init__(self, name: str, transport: Transport) -> None:
        """`name` is the machine's, for errors."""
        self._name = name
        self._transport = transport
        self._lock = threading.Lock()
        self._unfinished: list[Any] = []
        self._waiting: WaitingShell | None = None
        self._starter: threading.Thread | None = None

    def open(self, line: str, deadline: float, size: tuple[int, int] | None = None) -> Any:
        """Open a channel and send a command line. A server that does not accept the line closes the channel.

        With `size`, in columns and rows, the command gets a terminal.
        """
        with self._lock:
            self._unfinished = [channel for channel in self._unfinished if not channel.closed]
            while len(self._unfinished) > MAX_UNFINISHED:
                self._unfinished.pop(0).close()
        started = False
        try:
            channel = self._transport.open_session(timeout=max(0.1, deadline - time.monotonic()))
            started = True
            if size is not None:
                self._transport.send_pty(channel, size)
            self._transport.send_exec(channel, line)
        except BROKEN as error:
            if self.is_broken():
                what = "was lost while a command was sent" if started else "is closed; the command was not sent"
                raise ConnectionLostError(f"the connection to {self._name} {what}", started=started) from None
            if time.monotonic() >= deadline:
                raise CommandTimeoutError("the guest did not start the command in time", which="overall") from None
            raise NotStartedError(f"the guest's SSH server opens no channel: {login.describe(error)}") from None
        return channel

    def release(self, channel: Any) -> None:
        """Release a channel, whether or not its command has ended."""
        if channel.status_event.is_set():
            channel.close()
        else:
            # After an early close, dropbear reports the exit of this command as that of a later one.
            with self._lock:
                self._unfinished.append(channel)

    def is_broken(self) -> bool:
        """Whether the connection is broken. Gives paramiko's thread a moment to notice."""
        self._transport.join(0.5)
        return not self._transport.is_active()

    # -- the waiting shell

    def prestart_shell(self, via: Via) -> None:
        """Start a shell for the next command in the background, unless there is one."""
        with self._lock:
            if self._waiting is None and self._starter is None:
                self._starter = threading.Thread(
                    target=self._start_shell, args=(via,), name="vmtasks shell", daemon=True
                )
                self._starter.start()

    def _start_shell(self, via: Via) -> None:
        token = secrets.token_hex(4)
        with contextlib.suppress(SshError):
            channel = self.open(commands.waiting_shell_line(token, via), time.monotonic() + OPEN_S)
            with self._lock:
                other, self._waiting = self._waiting, WaitingShell(channel, token)
            if other is not None:
                self._dismiss(other)

    def take_shell(self, deadline: float) -> WaitingShell | None:
        """Take the waiting shell, if there is one."""
        starter = self._starter
        if starter is not None:
            starter.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._starter = None
            waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.is_usable():
            return waiting
        self._dismiss(waiting)
        return None

    def expire_shell(self) -> None:
        """Dismiss a shell that has waited too long."""
        with self._lock:
            old = self._waiting if self._waiting is not None and not self._waiting.is_usable() else None
            if old is not None:
                self._waiting = self._starter = None
        if old is not None:
            self._dismiss(old)

    def _dismiss(self, waiting: WaitingShell) -> None:
        with contextlib.suppress(*BROKEN):
            waiting.channel.shutdown_write()
        self.release(waiting.channel)
