"""One authenticated SSH connection to a machine, and commands over it.

    with client.connect(target, timeout_s=20) as connection:
        done = connection.execute(["make", "check"], cwd="src", timeout_s=600, on_line=show)
        done.stdout, done.stderr, done.status, done.signal

A connection never reconnects; link.py does that.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Self

from vmtasks.errors import CommandTimeoutError, ConfigError, ConnectionLostError, SshError
from vmtasks.guest import command as commands
from vmtasks.guest import login
from vmtasks.guest.channels import BROKEN, OPEN_S, Channels, NotStartedError, exit_status
from vmtasks.guest.command import Command, CommandResult, OnData, OnLine, Wire
from vmtasks.guest.pump import Pump, StopReason, feed
from vmtasks.guest.ssh import KEEPALIVE_S, LINE_BYTES, Console, Target, end_group_script, remote_line
from vmtasks.guest.terminal import LOGIN_SHELL, Terminal
from vmtasks.guest.transport import Transport

END_S = 20.0
GONE_EVERY_S = 1.0
MISSED = 4
TRIES = 4


class Connection:
    """A logged-in connection. Thread-safe: several commands may run at once, each on its own channel."""

    def __init__(
        self, target: Target, transport: Transport, keepalive_s: float, gone: Callable[[], bool] | None
    ) -> None:
        """Use connect()."""
        self.target = target
        self._transport = transport
        self._channels = Channels(target.name, transport)
        self._via: commands.Via = ""
        self._closing = threading.Event()
        threading.Thread(target=self._keep_alive, args=(keepalive_s,), name="vmtasks keepalive", daemon=True).start()
        if gone is not None:
            threading.Thread(target=self._close_when_gone, args=(gone,), name="vmtasks gone", daemon=True).start()

    def __enter__(self) -> Self:
        """Close it at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def server(self) -> str:
        """How the server names itself, such as `SSH-2.0-OpenSSH_9.2`."""
        return str(self._transport.remote_version)

    def is_connected(self) -> bool:
        """Whether the connection is alive. A silent guest is noticed once keepalives are overdue."""
        return bool(self._transport.is_active())

    def close(self) -> None:
        """Close the connection. Commands keep running in the guest; their end is not seen here."""
        self._closing.set()
        self._transport.close()

    def execute(
        self,
        command: Command,
        *,
        timeout_s: float,
        idle_s: float | None = None,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        user: str = "",
        stdin: bytes | BinaryIO = b"",
        on_line: OnLine | None = None,
        on_data: OnData | None = None,
        keep: bool = True,
        detached: bytes = b"",
    ) -> CommandResult:
        """Run a script (str) or a program with arguments (list) to its end; both streams are bytes, separate and exact.

        `on_line(line, stream)` is called for each line as it comes, `on_data(data, stream)` for each block; with
        `keep=False` the result holds no output. `cwd` is relative to the login user's home. `user` is reached through
        doas, sudo or su. A status other than 0 is a result, not an error. A command that prints `detached` last and
        closes its streams counts as ended and keeps running.

        CommandTimeoutError after `timeout_s`, or after `idle_s` without output: the command's process group was
        ended in the guest. ConnectionLostError when the connection broke: `started` tells whether the command may have
        run. ConfigError for an invalid command.
        """
        text = commands.script(command, cwd=cwd, env=env, user=user)
        for left in reversed(range(TRIES)):
            try:
                return self._once(
                    text, timeout_s, idle_s, user, stdin, on_line=on_line, on_data=on_data, keep=keep, detached=detached
                )
            except NotStartedError:
                # dropbear closes a channel that is opened just as another channel's command ends. Nothing has run.
                if not left or not isinstance(stdin, bytes):
                    raise
                time.sleep(0.1)
        raise AssertionError("the last try returns or raises")

    def open_terminal(
        self,
        command: Command = "",
        *,
        columns: int = 80,
        rows: int = 24,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        user: str = "",
        timeout_s: float = OPEN_S,
    ) -> Terminal:
        """Run a command, by default a login shell, on a terminal of its own. `cwd`, `env`, `user` as for execute().

        CommandTimeoutError if the guest opens none within `timeout_s`; ConfigError for an invalid or too long command.
        """
        line = remote_line(commands.script(command or LOGIN_SHELL, cwd=cwd, env=env, user=user))
        if len(line) > LINE_BYTES:
            raise ConfigError("the command for the terminal is too long", hint="put it into a file in the guest")
        channel = self._channels.open(line, time.monotonic() + timeout_s, (columns, rows))
        return Terminal(self.target.name, channel)

    def _once(
        self,
        text: str,
        timeout_s: float,
        idle_s: float | None,
        user: str,
        stdin: bytes | BinaryIO,
        *,
        detached: bytes,
        **more: Any,
    ) -> CommandResult:
        """Make one attempt of execute()."""
        deadline = time.monotonic() + timeout_s
        # A detached command needs a shell of its own, whose command line identifies it later; see job.py. So does a
        # command that reads a stream, which cannot be read again for a second attempt.
        fresh = detached != b"" or not isinstance(stdin, bytes)
        channel, wire = self._start(text, deadline, stdin=stdin != b"", fresh=fresh)
        try:
            pump = Pump(channel, wire.token, header_lines=wire.header_lines, **more)
            feed(channel, wire.preamble, stdin)
            reason = pump.until_end(deadline, idle_s, detached=detached)
            self._via = self._via or pump.header.via
            if reason == "ended":
                pump.finish()
                done = self._result(channel, pump, detached, waited=wire.header_lines > 1)
                if self._via:
                    self._channels.prestart_shell(self._via)
                return done
            ended = self._end_group(pump, user)
            pump.finish()
        finally:
            self._channels.release(channel)
        raise _timeout_error(reason, timeout_s if reason == "overall" else idle_s or 0.0, pump, ended=ended)

    def _start(self, text: str, deadline: float, *, stdin: bool, fresh: bool) -> tuple[Any, Wire]:
        """Start a command, in the waiting shell or a new one; returns its channel."""
        waiting = None if fresh else self._channels.take_shell(deadline)
        if waiting is not None:
            return waiting.channel, Wire(
                "", commands.waiting_shell_input(text, stdin=stdin), waiting.token, header_lines=2
            )
        wire = commands.wire(text, secrets.token_hex(4), self._via, stdin=stdin)
        return self._channels.open(wire.line, deadline), wire

    def _result(self, channel: Any, pump: Pump, detached: bytes, *, waited: bool) -> CommandResult:
        if detached and pump.stdout.endswith(detached):
            return CommandResult(pump.stdout, pump.stderr, 0)
        ended = exit_status(channel)
        # An exit status may also come from a login shell that refuses commands.
        if ended and not pump.header.seen and (waited or ended[1]):
            raise NotStartedError("the shell for the command was killed in the guest before it started")
        if ended:
            return CommandResult(pump.stdout, pump.stderr, *ended)
        if self._channels.is_broken():
            raise ConnectionLostError(
                f"the connection to {self.target.name} was lost; how the command ended is not known",
                stdout=pump.stdout,
                stderr=pump.stderr,
                hint="run a command that must survive this as a job",
            )
        # The server did not answer the request, or the waiting shell printed no header.
        if not channel.event_ready or (waited and not pump.header.seen):
            raise NotStartedError("the guest's SSH server refused to run the command")
        raise SshError("the guest's SSH server gave no status for the command")

    def _end_group(self, pump: Pump, user: str) -> bool:
        """End a command's process group in the guest; returns whether that is certain."""
        limit = time.monotonic() + END_S
        # A guest that no longer answers may also block sending: then close the whole connection.
        guard = threading.Timer(END_S, self._transport.close)
        guard.daemon = True
        guard.start()
        try:
            if pump.header.group:
                wire = commands.wire(end_group_script(pump.header.group, user), "0", self._via)
                other = self._channels.open(wire.line, limit)
                try:
                    Pump(other, "0").until_end(limit)
                finally:
                    self._channels.release(other)
            return pump.until_end(min(limit, time.monotonic() + 5)) == "ended" and pump.header.group != 0
        except SshError:
            return False
        finally:
            guard.cancel()

    def _close_when_gone(self, gone: Callable[[], bool]) -> None:
        """Close the connection as soon as `gone` reports that its other end is gone."""
        while not self._closing.wait(GONE_EVERY_S) and self.is_connected():
            if gone():
                self._transport.close()

    def _keep_alive(self, every_s: float) -> None:
        """Send keepalives; close the connection when MISSED intervals pass without an answer."""
        while not self._closing.wait(every_s) and self.is_connected():
            self._channels.expire_shell()
            guard = threading.Timer(every_s * MISSED, self._transport.close)
            guard.daemon = True
            guard.start()
            with contextlib.suppress(*BROKEN):
                self._transport.global_request("keepalive@openssh.com", wait=True)
            guard.cancel()


def _timeout_error(reason: StopReason, limit_s: float, pump: Pump, *, ended: bool) -> CommandTimeoutError:
    how = f"within {limit_s:g} s" if reason == "overall" else f"and said nothing for {limit_s:g} s"
    then = "it was ended" if ended else "it may still run: it could not be ended in the guest"
    return CommandTimeoutError(
        f"the command did not end {how}; {then}",
        which="overall" if reason == "overall" else "idle",
        stdout=pump.stdout,
        stderr=pump.stderr,
    )


def connect(
    target: Target,
    *,
    timeout_s: float,
    console: Console | None = None,
    keepalive_s: float = KEEPALIVE_S,
    gone: Callable[[], bool] | None = None,
) -> Connection:
    """Log in to a machine within `timeout_s`, once. Its host key must be one of those that `target` pins.

    The key is `target.key` (ed25519, ECDSA or RSA); an encrypted key is used through the agent. A guest that falls
    silent later is noticed after 5 times `keepalive_s`. `gone` is polled each second; the connection is closed when it
    returns True. Each failure has its own SshError, with the lines of `console`: ConnectRefusedError, BannerError,
    HostKeyError, AuthFailedError, ConnectTimeoutError.
    """
    try:
        transport = login.open_transport(target, time.monotonic() + timeout_s)
    except SshError as error:
        raise error.replace(console=tuple(console()) if console else ()) from error
    return Connection(target, transport, keepalive_s, gone)
