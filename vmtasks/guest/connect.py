"""Our own commands in a guest: each goes through one Connection. People, rsync and scp go through OpenSSH.

The lazy front door of `client`: importing paramiko takes 0.2 s, which `doit list` and `vmtasks ps` do not pay.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vmtasks.errors import HostKeyError, SshError
from vmtasks.guest import banner
from vmtasks.guest.ssh import Target

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection
    from vmtasks.guest.command import Command, CommandResult

TRY_S = 15.0
READY_S = 8.0


def connect(target: Target, *, timeout_s: float, **more: Any) -> "Connection":
    """Log in, once; see client.connect()."""
    from vmtasks.guest import client  # noqa: PLC0415 - paramiko takes 0.2 s

    return client.connect(target, timeout_s=timeout_s, **more)


def run(target: Target, command: "Command", *, timeout_s: float, **more: Any) -> "CommandResult":
    """Log in, run one command within `timeout_s`, and close the connection. See Connection.execute()."""
    until = time.monotonic() + timeout_s
    with connect(target, timeout_s=timeout_s) as connection:
        return connection.execute(command, timeout_s=max(0.1, until - time.monotonic()), **more)


def is_ready(target: Target, *, timeout_s: float = READY_S) -> bool:
    """Whether the guest accepts a login and runs a command now."""
    try:
        return run(target, "true", timeout_s=timeout_s).status == 0
    except SshError:
        return False


def wait(
    target: Target,
    *,
    timeout_s: float,
    alive: Callable[[], bool],
    network: Callable[[], bool | None] = banner.network_unknown,
) -> "Connection":
    """Wait until the guest accepts a login and runs a command; returns the connection. `network`: see banner.wait().

    SshError when `alive` returns False, at once when the guest shows another host key, or after `timeout_s`, with the
    stage reached.
    """
    until = time.monotonic() + timeout_s
    while True:
        left_s = until - time.monotonic()
        stage = banner.wait(target.port, timeout_s=left_s, alive=alive, network=network)
        if not stage:
            try:
                return _connect_and_test(target)
            except HostKeyError as error:  # waiting does not help
                raise error.replace(hint="doit restore, if nothing in it is needed") from error
            except SshError as error:
                stage = error.message
        if not alive():
            raise SshError(f"machine {target.name} ended while it was booting")
        if time.monotonic() > until:
            raise SshError(f"machine {target.name} did not accept SSH within {timeout_s:.0f} s: {stage}")
        time.sleep(0.2)


def _connect_and_test(target: Target) -> "Connection":
    """Connect, and run one command to prove the connection."""
    with ExitStack() as stack:
        connection = stack.enter_context(connect(target, timeout_s=TRY_S))
        done = connection.execute("true", timeout_s=TRY_S)
        if done.status != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise SshError(f"the guest accepts the login, but runs no command: {said or f'status {done.status}'}")
        stack.pop_all()
    return connection
