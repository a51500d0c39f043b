"""The one door to other processes: list argv, stdin closed, explicit deadline, always reaped."""

import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmtasks.errors import CommandError, MissingToolError

log = logging.getLogger(__name__)

PACKAGES = {
    "apt-get": "apt",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsync": "rsync",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
"""Program -> Debian package; other distributions name them alike or in docs/."""

TIMED_OUT = 124
"""The status of a command that was ended at its deadline, as timeout(1) has it."""


@dataclass(frozen=True)
class Result:
    """What a finished command left: `status` is 128 + N after signal N; text is decoded leniently."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


def find(program: str) -> str:
    """The absolute path of `program`; MissingToolError with the install command when there is none."""
    path = shutil.which(program)
    if path is None:
        package = PACKAGES.get(program, program)
        raise MissingToolError(f"{program} is not installed", hint=f"apt-get install {package} (or ./doit, which asks)")
    return path


def quote(argv: Sequence[str]) -> str:
    """`argv` as one line that a POSIX shell reads back to the same words."""
    return shlex.join(argv)


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
    stdin: str | None = None,
) -> Result:
    """Run a helper to its end and return its output.

    `env` is added to the environment of this process. Raises MissingToolError, and with `check` CommandError on a
    status other than 0 or at the deadline (status 124).
    """
    words = tuple(str(word) for word in argv)
    log.debug("run %s", quote(words))
    with spawn(words, cwd=cwd, env=env, pipe=True, stdin=stdin is not None) as child:
        try:
            out, err = child.communicate(None if stdin is None else stdin.encode(), timeout=timeout_s)
            status = shell_status(child.returncode)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            status = TIMED_OUT
    result = Result(words, status, out.decode(errors="replace"), err.decode(errors="replace"))
    if check and status != 0:
        how = f"did not end within {timeout_s:g} s" if status == TIMED_OUT else f"exited with {status}"
        said = result.stderr.strip() or result.stdout.strip() or "no output"
        raise CommandError(f"{quote(words)} {how}: {said[-2000:]}", status=status, stderr=result.stderr)
    return result


@contextmanager
def spawn(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
    pipe: bool = False,
    stdin: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a helper and see to it that it is gone when the block ends.

    Output goes to `output` (both streams), to pipes with `pipe`, and otherwise nowhere. The child is the leader of its
    own process group, so Ctrl-C reaches it only through us. On the way out: SIGTERM, 2 s, SIGKILL, reaped.
    """
    words = [str(word) for word in argv]
    words[0] = find(words[0])
    sink = subprocess.PIPE if pipe else (output or subprocess.DEVNULL)
    child = subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT if output is not None else sink,
        pass_fds=tuple(pass_fds),
        process_group=0,
    )
    try:
        yield child
    finally:
        end(child)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def end(child: subprocess.Popen[bytes], grace_s: float = 2.0) -> int:
    """Make sure that a child of ours is gone: SIGTERM, `grace_s`, SIGKILL. Returns its status."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
    return shell_status(child.wait())
