"""The QEMU process: start it as our child or as a daemon, identify it later, stop it, and manage its socket folders."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vmtasks.errors import CommandError, MachineError
from vmtasks.host import files, process, processes
from vmtasks.qemu import argv, console, events, qmp

LAUNCH_S = 30.0
STRAY_S = 10.0
IDLE_S = 86400.0
SOCKET_PATH_BYTES = 107
"""The longest path of a UNIX socket; see unix(7)."""


@dataclass
class Booted:
    """A QEMU that is our child, with open console and control sockets."""

    process: process.Child
    serial: console.Serial
    control: qmp.Qmp


@dataclass(frozen=True)
class Pid:
    """A process, identified by number and start time, so that a recycled number does not match."""

    number: int
    started: str

    def alive(self, mark: str) -> bool:
        """Whether it runs and is the process that we started: same start time, and `mark` in its command line.

        The kernel frees the memory of an exiting process, and with it the command line, before it closes its files. So
        an empty command line counts as alive: locks and ports are still held.
        """
        if not self.started or processes.started(self.number) != self.started:
            return False
        line = processes.command_line(self.number)
        return not line or mark in line


Rung = tuple[str, Callable[[], object], float]
"""A step of stop(): name, action, seconds to wait afterwards unless the action returned False."""


@contextlib.contextmanager
def boot(spec: argv.Spec, output: Path, *, pass_fds: Sequence[int] = ()) -> Iterator[Booted]:
    """Run QEMU as our child during the block; it never outlives us. Its own output goes to the file `output`.

    MachineError with QEMU's output when it does not start.
    """
    words = argv.command(spec)
    with (
        output.open("wb") as sink,
        process.spawn(words, output=sink, pass_fds=pass_fds, die_with_us=True, unprivileged=True) as child,
        contextlib.ExitStack() as stack,
    ):
        try:
            serial = stack.enter_context(console.connect(spec.console_socket, timeout_s=LAUNCH_S, ended=_ended(child)))
            control = stack.enter_context(qmp.connect(spec.qmp_socket, timeout_s=LAUNCH_S, ended=_ended(child)))
        except MachineError as error:
            process.end(child)
            said = files.read_text(output, "replace").strip()
            raise MachineError(f"QEMU did not start: {said or error.message}", log=output) from None
        yield Booted(child, serial, control)


def _ended(child: process.Child) -> Callable[[], bool]:
    return lambda: child.poll() is not None


def launch(spec: argv.Spec, output: Path, *, die_with_us: bool = False) -> Pid:
    """Start a QEMU that outlives us, unless `die_with_us`; its own output goes to the file `output`.

    MachineError with QEMU's output when it ends or opens no control socket; see port_taken() for one cause. Does not
    use -daemonize, which forks after the sandbox has forbidden that.
    """
    if spec.events is not None:
        events.prepare(spec.events)
    with output.open("wb") as sink:
        child = process.detach(argv.command(spec), sink, die_with_us=die_with_us, unprivileged=True)
    try:
        with qmp.connect(spec.qmp_socket, timeout_s=LAUNCH_S, ended=_ended(child)) as control:
            control.cmd("query-status")
    except BaseException as error:
        process.end(child)
        said = files.read_text(output, "replace").strip()
        if isinstance(error, MachineError):
            raise MachineError(f"QEMU did not start: {said or error.message}", log=output) from None
        raise
    pid = Pid(child.pid, processes.started(child.pid))
    process.reap_when_over(child)
    return pid


def find(pidfile: Path) -> Pid | None:
    """Find our QEMU that was started with this pid file, by its command line alone.

    MachineError when it runs as another user than we or the owner of the file's folder.
    """
    for number in processes.numbers():
        started, words = processes.started(number), processes.words(number)
        if not words or Path(words[0]).name != argv.PROGRAM or not started or not _has_pidfile(words, pidfile):
            continue
        runs_as = processes.user(number)
        if runs_as not in (os.geteuid(), pidfile.parent.stat().st_uid):
            raise MachineError(
                f"process {number} was started with {pidfile}, by user {runs_as}: it is not ours to stop",
                hint="ask that user, or root, to stop it",
            )
        if processes.started(number) == started:
            return Pid(number, started)
    return None


def _has_pidfile(words: Sequence[str], pidfile: Path) -> bool:
    wanted = pidfile.resolve()
    return any(word == "-pidfile" and Path(value).resolve() == wanted for word, value in pairwise(words))


def end_stray(qmp_socket: Path) -> bool:
    """End a QEMU that serves this socket but has no record. True if there was one.

    Its starter was killed before it could write the record. A socket in our private folder proves that it is ours.
    """
    if not qmp_socket.exists():
        return False
    try:
        with qmp.connect(qmp_socket, timeout_s=0, ended=lambda: True) as control:
            control.cmd("quit")
    except MachineError:
        return False
    return wait_until(lambda: not qmp_socket.exists(), STRAY_S)


def port_taken(error: MachineError) -> int | None:
    """The loopback port that QEMU could not bind, if that is why it ended; else None."""
    found = re.search(r"Could not set up host forwarding rule 'tcp:127\.0\.0\.1:(\d+)-", error.message)
    return int(found[1]) if found else None


def stop(pid: Pid, mark: str, rungs: Sequence[Rung], qmp_socket: Path) -> str:
    """Stop the machine: try `rungs`, then QMP quit, SIGTERM and SIGKILL; returns the rung that stopped it.

    Signals only a process that is provably ours. MachineError when it survives SIGKILL.
    """

    def send_signal(number: int) -> Callable[[], object]:
        return lambda: os.kill(pid.number, number) if pid.alive(mark) else None

    ladder = [
        *rungs,
        ("QMP quit", control(qmp_socket, "quit"), 10.0),
        ("SIGTERM", send_signal(signal.SIGTERM), 5.0),
        ("SIGKILL", send_signal(signal.SIGKILL), 5.0),
    ]
    for name, action, wait_s in ladder:
        if not pid.alive(mark):
            return "already stopped"
        done: object = False
        with contextlib.suppress(MachineError, ProcessLookupError, CommandError):
            done = action()
        if done is False:
            continue
        if wait_until(lambda: not pid.alive(mark), wait_s, every_s=0.05):
            return name
    raise MachineError(f"process {pid.number} did not end even after SIGKILL", hint="is it stuck in the kernel? see ps")


def control(qmp_socket: Path, command: str) -> Callable[[], None]:
    """Make the action of a rung that runs one QMP command."""

    def send() -> None:
        with qmp.connect(qmp_socket, timeout_s=5) as connection:
            connection.cmd(command)

    return send


def wait_until(condition: Callable[[], bool], timeout_s: float, *, every_s: float = 0.1) -> bool:
    """Poll `condition`: True as soon as it is true, False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every_s)
    return True


def socket_base(*, make: bool = True) -> Path:
    """Our private folder for UNIX sockets, with a short path. MachineError when another user owns it.

    With `make` False it may not exist.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.access(runtime, os.W_OK) and len(os.fsencode(runtime)) <= 40:
        base = Path(runtime) / "vmtasks"
    else:
        base = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= 40 else "/tmp") / f"vmtasks-{os.getuid()}"  # noqa: S108
    if make:
        base.mkdir(mode=0o700, exist_ok=True)
    try:
        stat = base.lstat()
    except FileNotFoundError:
        return base
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077 or base.is_symlink():
        raise MachineError(f"{base} is not a private folder of ours", hint=f"check its owner, then: rm -r {base}")
    return base


def socket_place(machine: Path) -> Path:
    """The path of socket_folder(), without creating it."""
    return socket_base(make=False) / hashlib.sha256(os.fsencode(machine.absolute())).hexdigest()[:12]


def socket_folder(machine: Path) -> Path:
    """Create the folder for the sockets of the machine whose state folder is `machine`, and mark it as used now."""
    folder = socket_place(machine)
    with _exclusive(socket_base()):
        folder.mkdir(mode=0o700, exist_ok=True)
        os.utime(folder)
    return folder


def reap_sockets(idle_s: float = IDLE_S) -> list[Path]:
    """Remove socket folders that were not used for `idle_s` and have no listener; returns them.

    A machine's folder that is removed by hand leaves one behind. An existing machine recreates its own when needed.
    """
    base, removed = socket_base(make=False), []
    for folder in base.iterdir() if base.is_dir() else ():
        if not re.fullmatch(r"[0-9a-f]{12}", folder.name) or not _idle(folder, idle_s) or _in_use(folder):
            continue
        with _exclusive(base):
            if _idle(folder, idle_s):  # again: socket_folder() may have been called meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


@contextlib.contextmanager
def _exclusive(base: Path) -> Iterator[None]:
    """Hold the lock for creating and removing socket folders."""
    handle = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _idle(folder: Path, idle_s: float) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - folder.lstat().st_mtime > idle_s
    return False


def _in_use(folder: Path) -> bool:
    """Whether a process listens on a socket in the folder."""
    return any(path.is_socket() and has_listener(path) for path in sorted(folder.iterdir()))


def has_listener(path: Path) -> bool:
    """Whether a process listens on a socket; True if that cannot be determined."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextlib.contextmanager
def temporary_sockets() -> Iterator[Path]:
    """A socket folder that exists during the block. Also removes those of processes that were killed."""
    base = socket_base()
    for old in base.glob("p*"):
        pid = re.fullmatch(r"p(\d+)-.*", old.name)
        if pid is not None and not processes.started(int(pid[1])):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"p{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
