"""An SSH session in a machine, on our own streams."""

import os
import secrets
from collections.abc import Mapping, Sequence
from functools import partial

from vmtasks.errors import CommandTimeoutError
from vmtasks.guest import ssh
from vmtasks.host import process, progress, signals
from vmtasks.machines import health, life
from vmtasks.machines.folder import Place
from vmtasks.machines.sessions import recorded_session

END_S = 20.0


def log_in(
    place: Place,
    verb: str,
    command: str = "",
    *,
    cwd: str = "",
    env: Mapping[str, str] | None = None,
    failed: int = ssh.FAILED,
    options: Sequence[str] = (),
    shown: str = "",
    stdin: bool = True,
    timeout_s: float | None = None,
    tty: bool = False,
    user: str = "",
) -> int:
    """Log in to a machine, or run a shell command there; returns its status, `failed` if ssh failed.

    The command runs in `cwd` (relative to the login user's home) with `env`, as `user`. It reads our stdin, or
    nothing, and has a terminal with `tty`. CommandTimeoutError after `timeout_s`. Its processes are ended in the guest
    at the deadline, on an interrupt, and when its output is no longer read. `options` are ssh's. `verb` and `shown` go
    into the list of sessions and the access log. If ssh fails, or the guest is paused, stderr gets the reason.
    """
    target = life.wait_ready(place)
    mark = f"vmtasks-{secrets.token_hex(8)}"
    with health.warn_when_stuck(place), recorded_session(place, verb, shown, user) as result:
        argv = target.argv(options=[*options, *(["-tt"] if tty else [])])
        if command:
            argv = ssh.session_argv(target, mark, command, cwd=cwd, env=env, user=user, options=options, tty=tty)
        # Options may select another user, or a separate connection.
        run = partial(process.run_attached, argv) if options else partial(ssh.run_attached, target, argv)
        try:
            result.status = run(stdin=stdin, timeout_s=timeout_s)
        except CommandTimeoutError:
            result.status = process.TIMED_OUT
            ended = "it was ended" if _end(place, target, mark, user) else "it may still run in the guest"
            raise CommandTimeoutError(
                f"the command did not end within {timeout_s:g} s; {ended}", which="overall"
            ) from None
        except KeyboardInterrupt:
            if command:
                _end(place, target, mark, user)
            raise
        if result.status == process.UNREAD:
            _end(place, target, mark, user)
    if result.status == ssh.FAILED and (why := health.is_alive(place).reason):
        progress.say(f"error: {why}\nhint: vmtasks doctor {place.name}")
        return failed
    return result.status


def _end(place: Place, target: ssh.Target, mark: str, user: str) -> bool:
    """End a command's processes in the guest; returns whether that worked, with a warning if not."""
    record = place.record()
    if record is None or record.owner == os.getpid():  # it ends with the machine
        return True
    with signals.cuttable():
        line = ssh.remote_line(ssh.end_marked_script(mark, user))
        done = process.run(target.argv(line), timeout_s=END_S, check=False)
    if done.status != 0:
        why = ssh.last_line(done.stderr)
        progress.say(f"warning: machine {place.name}: the command may still run in the guest: {why}")
    return done.status == 0
