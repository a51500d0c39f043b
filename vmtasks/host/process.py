"""Runs all other programs: list argv, stdin closed, explicit deadline, always reaped."""

import os
import selectors
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from vmtasks.errors import CommandError, CommandTimeoutError, MissingToolError
from vmtasks.host import signals
from vmtasks.host.prctl import before_exec

PACKAGES = {
    "apt-get": "apt",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsync": "rsync",
    "scp": "openssh-client",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ssh-keyscan": "openssh-client",
}
"""Program -> Debian package."""
REQUIRED = tuple(sorted(PACKAGES.keys() - {"apt-get"}))
"""The programs that each host needs; apt-get is only for guests composed of packages."""

Child = subprocess.Popen[bytes]
"""A child process; it must be reaped."""

BLOCK = 1 << 18
GRACE_S = 2.0
"""How long a process may take to end after SIGTERM."""

UNREAD = 128 + signal.SIGPIPE
"""The status of a command that was ended because its output is no longer read."""

TIMED_OUT = 124
"""The status for our deadline, as in timeout(1). A command may exit with it by itself: see Ended."""


class Ended(msgspec.Struct, frozen=True):
    """How a command ended. `status` is 128 + N after signal N; `timed_out`: by us at its deadline, with TIMED_OUT."""

    status: int
    timed_out: bool = False


class Head:
    """A sink that keeps the first bytes of possibly endless output."""

    def __init__(self, limit: int = 4096) -> None:
        """Keep `limit` bytes."""
        self._limit = limit
        self._kept = bytearray()

    def __call__(self, data: bytes) -> None:
        """Take more data."""
        self._kept += data[: self._limit - len(self._kept)]

    @property
    def text(self) -> str:
        """The kept text."""
        return self._kept.decode(errors="replace")


AT_DEADLINE = Ended(TIMED_OUT, timed_out=True)


class Result(msgspec.Struct, frozen=True):
    """The result of a finished command: `status` and `timed_out` as in Ended; text is decoded with replacements."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    timed_out: bool = False


def find(program: str) -> str:
    """The absolute path of `program`; MissingToolError with the install command if it is missing."""
    path = shutil.which(program)
    if path is None:
        package = PACKAGES.get(program, program)
        raise MissingToolError(f"{program} is not installed", hint=f"apt-get install {package} (or ./doit, which asks)")
    return path


def quote(argv: Sequence[str]) -> str:
    """`argv` as one line that a POSIX shell splits into the same words."""
    return shlex.join(argv)


def _found(argv: Sequence[str | Path], how: str) -> list[str]:
    """`argv` with the path of its program, logged. MissingToolError."""
    import logging  # noqa: PLC0415 - costs a run that starts nothing 3 ms

    words = [find(str(argv[0])), *map(str, argv[1:])]
    logging.getLogger(__name__).debug("%s %s", how, quote(words))
    return words


def shell_status(returncode: int) -> int:
    """A subprocess return code as the shell states it: 128 + N for death by signal N."""
    return 128 - returncode if returncode < 0 else returncode


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    check: bool = True,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | bytes | None = None,
) -> Result:
    """Run a program to its end and return its output.

    `env` is added to the environment of this process. Raises MissingToolError, and with `check` CommandError on a
    status other than 0 or at the deadline (status 124).
    """
    words = tuple(str(word) for word in argv)
    with spawn(words, cwd=cwd, env=env, pipe=True, stdin=stdin is not None) as child:
        try:
            out, err = child.communicate(stdin.encode() if isinstance(stdin, str) else stdin, timeout=timeout_s)
            ended = Ended(shell_status(child.returncode))
        except subprocess.TimeoutExpired as late:
            # Its children may keep our pipes open, so end the whole group.
            ended = AT_DEADLINE if child.poll() is None else Ended(shell_status(child.returncode))
            _signal(child, signal.SIGKILL)
            try:
                out, err = child.communicate(timeout=1)
            except subprocess.TimeoutExpired:
                out, err = late.output or b"", late.stderr or b""
    texts = (out.decode(errors="replace"), err.decode(errors="replace"))
    result = Result(words, ended.status, *texts, timed_out=ended.timed_out)
    if check and ended.status != 0:
        how = f"did not end within {timeout_s:g} s" if ended.timed_out else f"exited with {ended.status}"
        said = result.stderr.strip() or result.stdout.strip() or "no output"
        raise CommandError(
            f"{quote(words)} {how}: {said[-2000:]}",
            status=ended.status,
            stderr=result.stderr,
            timed_out=ended.timed_out,
        )
    return result


def run_attached(argv: Sequence[str | Path], *, stdin: bool = True, timeout_s: float | None = None) -> int:
    """Run a program on our own terminal and streams, to its end; returns its status.

    Without `stdin` its input is empty. CommandTimeoutError after `timeout_s`; without that there is no deadline,
    because a user is present. The kernel ends it when we are killed (Linux only). If our stdout is a pipe that is no
    longer read, as by `| head`, it is ended with the status of SIGPIPE: ssh would wait forever.
    """
    words = _found(argv, "attach")
    pipe = subprocess.PIPE if _stdout_is_pipe() else None
    source = None if stdin else subprocess.DEVNULL
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with subprocess.Popen(words, stdin=source, stdout=pipe, preexec_fn=before_exec(die_with_us=True)) as child:  # noqa: PLW1509 - as below
        try:
            if child.stdout is not None:
                _hand_on(child.stdout.fileno(), deadline)
            return shell_status(child.wait(_left(deadline)))
        except BrokenPipeError:
            return UNREAD
        except subprocess.TimeoutExpired:
            raise CommandTimeoutError(f"{words[0]} did not end within {timeout_s:g} s", which="overall") from None
        finally:
            # SIGTERM first: ssh then restores the terminal.
            child.terminate()
            if not wait(child, GRACE_S):
                child.kill()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _stdout_is_pipe() -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(1).st_mode)
    except OSError:
        return False  # it is closed


def _hand_on(source: int, deadline: float | None) -> None:
    """Copy `source` to our stdout until its end or the deadline. BrokenPipeError if stdout is no longer read."""
    with selectors.DefaultSelector() as ready:
        ready.register(source, selectors.EVENT_READ)
        while ready.select(_left(deadline)):
            data = os.read(source, BLOCK)
            if not data:
                return
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]


def stream(
    argv: Sequence[str | Path],
    sink: Callable[[bytes], object],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    errors: Callable[[bytes], object] | None = None,
    stdin: IO[bytes] | None = None,
) -> Ended:
    """Run a program and pass its output to `sink` as it arrives, both streams in one unless `errors` takes stderr.

    Returns how it ended; it is ended after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    with (
        spawn(argv, env=env, pipe=True, merge=errors is None, stdin=stdin or False) as child,
        selectors.DefaultSelector() as ready,
    ):
        for pipe, take in ((child.stdout, sink), (child.stderr, errors)):
            if pipe is not None:
                ready.register(pipe, selectors.EVENT_READ, take)
        while ready.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                if data := os.read(key.fd, BLOCK):
                    key.data(data)
                else:
                    ready.unregister(key.fileobj)
        try:
            return Ended(shell_status(child.wait(max(0.0, deadline - time.monotonic()))))
        except subprocess.TimeoutExpired:
            return AT_DEADLINE


@contextmanager
def spawn(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    die_with_us: bool = False,
    env: Mapping[str, str] | None = None,
    merge: bool = False,
    output: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
    pipe: bool = False,
    stdin: bool | IO[bytes] = False,
    unprivileged: bool = False,
) -> Iterator[Child]:
    """Start a program, and end it when the block ends.

    Output goes to `output` (both streams), to pipes with `pipe` (to one with `merge`), and otherwise to /dev/null.
    Input comes from a file, through a pipe with `stdin=True`, and otherwise from /dev/null. The child leads its own
    process group, so Ctrl-C reaches it only through us. At the end of the block: SIGTERM, 2 s, SIGKILL, reaped. With
    `die_with_us` the kernel ends it if we are killed; `unprivileged` leaves it no capability, also when we are root
    (both Linux only).
    """
    words = _found(argv, "run")
    sink = subprocess.PIPE if pipe else (output or subprocess.DEVNULL)
    child: Child | None = None
    try:
        with signals.deferred():
            child = subprocess.Popen(
                words,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=(subprocess.PIPE if stdin else subprocess.DEVNULL) if isinstance(stdin, bool) else stdin,
                stdout=sink,
                stderr=subprocess.STDOUT if output is not None or merge else sink,
                pass_fds=tuple(pass_fds),
                process_group=0,
                preexec_fn=before_exec(die_with_us=die_with_us, unprivileged=unprivileged),  # noqa: PLW1509 - system calls only
            )
        yield child
    finally:
        if child is not None:
            end(child)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()


def detach(
    argv: Sequence[str | Path], output: IO[bytes], *, die_with_us: bool = False, unprivileged: bool = False
) -> Child:
    """Start a process in its own session, which outlives us; its output goes to `output`.

    With `die_with_us` the kernel ends it when the calling thread ends, however that happens; `unprivileged` as for
    spawn() (both Linux only).
    """
    words = _found(argv, "detach")
    child: Child | None = None
    try:
        with signals.deferred():
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before_exec(die_with_us=die_with_us, unprivileged=unprivileged),  # noqa: PLW1509 - system calls only
            )
    except BaseException:
        if child is not None:
            end(child)
        raise
    return child


def reap_when_over(child: Child) -> None:
    """Reap a child in the background as soon as it ends, so that it is never a zombie."""
    threading.Thread(target=child.wait, name=f"reap {child.pid}", daemon=True).start()


def wait(child: Child, timeout_s: float) -> bool:
    """Whether the child ended within `timeout_s`."""
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def end(child: Child, grace_s: float = GRACE_S) -> int:
    """End a child and its process group: SIGTERM, `grace_s`, SIGKILL. Returns its status."""
    if child.poll() is None:
        _signal(child, signal.SIGTERM)
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
    return shell_status(child.wait())


def _signal(child: Child, number: signal.Signals) -> None:
    """Signal the process group that `child` leads, unless it was reaped: the pid may then be another process's."""
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
