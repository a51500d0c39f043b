"""The channels of one connection, each with the command line that was sent on it, and a shell that waits for the next.

To start a shell is most of what a short command costs in an emulated guest. So after a command has ended the next one's
shell is started at once, in the login's environment and home as ever; it ends by itself when it is not needed soon.
"""

import contextlib
import secrets
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
"""How many commands that we left may keep their channels: OpenSSH's server has 10 for a connection; see MaxSessions."""

OPEN_S = 10.0
SHELL_MAX_AGE_S = 20.0
"""How old a shell that waits may be: what has changed for new logins since then, such as groups, it does not know."""


class NotStartedError(SshError):
    """The server closed a channel before it took the command."""


@dataclass(frozen=True)
class WaitingShell:
    """A shell that waits on a channel; its first line on stderr has this token."""

    channel: Any
    token: str
    since: float = field(default_factory=time.monotonic)

    def is_usable(self) -> bool:
        """Whether it still waits, and is not too old."""
        over = self.channel.closed or self.channel.eof_received or self.channel.status_event.is_set()
        return not over and time.monotonic() - self.since < SHELL_MAX_AGE_S


class Channels:
    """To be used from any thread."""

    def __init__(self, name: str, transport: Transport) -> None:
        """`name` is the machine's, for errors."""
        self._name = name
        self._transport = transport
        self._lock = threading.Lock()
        self._unfinished: list[Any] = []
        self._waiting: WaitingShell | None = None
        self._starter: threading.Thread | None = None

    def open(self, line: str, deadline: float) -> Any:
        """A channel on which a command line was sent. If the server does not take it, it closes the channel."""
        with self._lock:
            self._unfinished = [channel for channel in self._unfinished if not channel.closed]
            while len(self._unfinished) > MAX_UNFINISHED:
                self._unfinished.pop(0).close()
        started = False
        try:
            channel = self._transport.open_session(timeout=max(0.1, deadline - time.monotonic()))
            started = True
            self._transport.send_exec(channel, line)
        except BROKEN as error:
            if self.is_broken():
                what = "was lost as a command was sent" if started else "is closed; the command was not sent"
                raise ConnectionLostError(f"the connection to {self._name} {what}", started=started) from None
            if time.monotonic() >= deadline:
                raise CommandTimeoutError("the guest did not start the command in time", which="overall") from None
            raise NotStartedError(f"the guest's SSH server opens no channel: {login.describe(error)}") from None
        return channel

    def release(self, channel: Any) -> None:
        """Have no more to do with a channel, whether or not its command has ended."""
        if channel.status_event.is_set():
            channel.close()
        else:
            # dropbear takes the exit of a command whose channel was closed before for that of a later one.
            with self._lock:
                self._unfinished.append(channel)

    def is_broken(self) -> bool:
        """Whether the connection is broken; paramiko's thread may be about to say so."""
        self._transport.join(0.5)
        return not self._transport.is_active()

    # -- the shell that waits

    def prestart_shell(self, via: Via) -> None:
        """Begin to start a shell for the next command, unless there is one."""
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
        """The shell that waits, if there is one; nobody else gets it."""
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
        """Dismiss a shell that has waited for too long."""
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
