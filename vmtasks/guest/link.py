"""A persistent link to a machine: connects on demand, reconnects after a loss, and notices reboots.

    with Link(target, console=tail, alive=runs, events=boots) as link:
        link.execute("make", cwd="src", timeout_s=600)      as Connection.execute, but explains a lost connection

    @resilient
    def update(link: Link) -> str: ...                       the same guard around several commands

A command with an unknown outcome is never run again. Use a job for a command that must outlive its connection; see
job.py.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from vmtasks.errors import (
    BannerError,
    CommandTimeoutError,
    ConnectionLostError,
    ConnectRefusedError,
    ConnectTimeoutError,
    MachineError,
    RebootedError,
    SshError,
)
from vmtasks.guest import boot, connect, ssh
from vmtasks.guest.boot import Boot, BootChange
from vmtasks.guest.command import Command, CommandResult
from vmtasks.guest.ssh import Console, Target
from vmtasks.host.progress import seconds

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection

P = ParamSpec("P")
T = TypeVar("T")

CONNECT_S = 20.0
PROBE_S = 30.0
RETRY_S = 0.5
TRIES = 5
WINDOW_S = 180.0
"""How long a guest may take to come back; a reboot under emulation takes 30 to 120 s."""

TRANSIENT = (ConnectRefusedError, BannerError, ConnectTimeoutError)
"""Errors of connecting to a guest that is still booting."""


class Link:
    """A link to one machine. Thread-safe: all threads share one connection."""

    def __init__(
        self,
        target: Target,
        *,
        window_s: float = WINDOW_S,
        connect_s: float = CONNECT_S,
        keepalive_s: float = ssh.KEEPALIVE_S,
        console: Console | None = None,
        alive: Callable[[], bool] = lambda: True,
        events: Callable[[], str] | None = None,
    ) -> None:
        """Open nothing yet.

        `window_s`: how long to retry after a loss. `console` returns the last lines for errors. `alive` returns
        whether the machine can still answer, or raises SshError with the reason, which ends the retries. `events`
        returns a marker that QEMU's RESET and SHUTDOWN events change: commands over the connection then fail at once.
        """
        self.target = target
        self.window_s = window_s
        self._connect_s = connect_s
        self._keepalive_s = keepalive_s
        self._console = console
        self._alive = alive
        self._events = events
        self._connection: Connection | None = None
        self._boot: Boot | None = None
        self._reached = False
        self._lock = threading.RLock()
        self._local = threading.local()

    def __enter__(self) -> Self:
        """Close it at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one. The link can be used again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = self._boot = None

    def open(self, *, wait_s: float | None = None) -> "Connection":
        """Return the current connection, or a new one; retries for `wait_s` while the guest is booting.

        By default the first connection is tried once, and a lost one is retried for the window. Raises the errors of
        client.connect(). Other threads wait while one connects.
        """
        with self._lock:
            connection = self._local.connection = self._open_locked(wait_s)
            return connection

    def _drop_used(self) -> None:
        """Close the connection that this thread used last, unless another thread has replaced it."""
        with self._lock:
            if self._connection is getattr(self._local, "connection", None):
                self.close()

    def _open_locked(self, wait_s: float | None) -> "Connection":
        if self._connection is not None and self._connection.is_connected():
            return self._connection
        if wait_s is None:
            wait_s = self.window_s if self._reached else 0.0
        self.close()
        until = time.monotonic() + wait_s
        while True:
            left = until - time.monotonic()
            try:
                limit = self._connect_s if wait_s == 0 else max(2.0, min(self._connect_s, left))
                self._connection = connect.connect(
                    self.target,
                    timeout_s=limit,
                    console=self._console,
                    keepalive_s=self._keepalive_s,
                    gone=self._reboot_detector(),
                )
            except TRANSIENT:
                if time.monotonic() >= until or not self._alive():
                    raise
                time.sleep(RETRY_S)
            else:
                self._reached = True
                return self._connection

    def _reboot_detector(self) -> Callable[[], bool] | None:
        """A function that returns whether the current boot has ended; None without QEMU's events."""
        events = self._events
        now = events() if events is not None else ""
        return (lambda: events() != now) if events is not None and now else None

    def boot(self) -> Boot:
        """The identity of the guest's boot; probed once for each connection."""
        with self._lock:
            return self._probe_boot(self.open())

    def _probe_boot(self, connection: "Connection") -> Boot:
        if self._boot is None:
            self._boot = boot.probe(
                lambda text: connection.execute(text, timeout_s=PROBE_S).stdout.decode(errors="replace"), self._events
            )
        return self._boot

    def execute(self, command: Command, *, timeout_s: float, **more: Any) -> CommandResult:
        """As Connection.execute, with the same arguments.

        Reconnects if the connection breaks: RebootedError if the guest has rebooted, else ConnectionLostError. The
        command is run a second time only if it certainly did not start.
        """
        before = self.current_boot()
        try:
            return self.open().execute(command, timeout_s=timeout_s, **more)
        except ConnectionLostError as lost:
            if lost.started:
                self.raise_explained(before, lost)
            return self.open().execute(command, timeout_s=timeout_s, **more)

    def reboot(self, *, timeout_s: float) -> None:
        """Reboot the guest, and connect again. MachineError after `timeout_s`."""
        before = self.boot()
        with contextlib.suppress(ConnectionLostError, CommandTimeoutError):
            self.open().execute("reboot", timeout_s=10.0, user="root")
        until = time.monotonic() + timeout_s
        while True:
            self.close()
            with contextlib.suppress(SshError):
                self.open(wait_s=max(1.0, until - time.monotonic()))
                if boot.compare(before, self.boot()) == "rebooted":
                    ssh.close(self.target)
                    return
            if time.monotonic() > until:
                raise MachineError(
                    f"{self.target.name} did not reboot within {seconds(timeout_s)}",
                    console=self._console() if self._console else (),
                )
            time.sleep(RETRY_S)

    def raise_explained(self, before: Boot, lost: ConnectionLostError) -> None:
        """Reconnect after a loss and raise its cause: RebootedError, or `lost` with the boot's state added."""
        if lost.explained:
            raise lost
        verdict = self.recover(before, lost)
        known = "; the guest has not rebooted" if verdict == "same" else ""
        raise lost.replace(message=lost.message + known, explained=True) from lost

    def recover(self, before: Boot, lost: ConnectionLostError) -> BootChange:
        """Reconnect after a loss; returns "same" or "unknown". RebootedError if the guest has rebooted since `before`.

        Raises `lost` if the guest does not come back within the window.
        """
        self._drop_used()
        try:
            self.open()
            verdict = boot.compare(before, self.current_boot())
        except ConnectionLostError:
            raise
        except SshError as error:
            when = f" within {self.window_s:g} s" if isinstance(error, TRANSIENT) else ""
            message = f"{lost.message}; the guest did not come back{when}: {error.message}"
            raise lost.replace(message=message, console=error.console, explained=True) from error
        if verdict == "rebooted":
            ssh.close(self.target)  # OpenSSH needs a minute to notice that its connections are dead
            raise RebootedError(
                f"{self.target.name} has rebooted, which ended its commands",
                console=self._console() if self._console else (),
            ) from lost
        return verdict

    def current_boot(self) -> Boot:
        """boot(), with a new connection if the current one is broken."""
        for left in reversed(range(TRIES)):
            try:
                return self.boot()
            except ConnectionLostError:
                self._drop_used()
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")


def resilient(function: Callable[Concatenate[Link, P], T]) -> Callable[Concatenate[Link, P], T]:
    """Guard a function that uses a Link: probe the boot before, and compare it afterwards and after a loss.

    The function is never called twice. RebootedError when the guest has rebooted meanwhile, even if the function
    seemed to succeed; ConnectionLostError when the connection broke, so that the outcome is unknown.
    """

    @functools.wraps(function)
    def guarded(link: Link, /, *args: P.args, **kwargs: P.kwargs) -> T:
        before = link.boot()
        try:
            result = function(link, *args, **kwargs)
        except ConnectionLostError as lost:
            link.raise_explained(before, lost)
            raise
        if boot.compare(before, link.boot()) == "rebooted":
            raise RebootedError(f"{link.target.name} has rebooted meanwhile")
        return result

    return guarded
