"""File locks across processes: the kernel drops one when its holder dies, and a note beside it names the holder."""

import contextlib
import fcntl
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from vmtasks.errors import BusyError, StateError
from vmtasks.host import files, processes, signals

Waiting = Callable[[str], None]
POLL_S = 0.1


class Holder(msgspec.Struct, frozen=True):
    """The process that a lock's note names: its pid, its start, and the digest of its command line."""

    pid: int
    started: str
    command_sha256: str

    @classmethod
    def of(cls, pid: int) -> "Holder":
        """Identify a running process."""
        return cls(pid, processes.started(pid), hashlib.sha256(processes.command_line(pid).encode()).hexdigest())

    def holds(self, path: Path) -> bool:
        """Whether this process still runs and, on Linux, has the lock file open."""
        if not self.started or self != Holder.of(self.pid):
            return False
        return sys.platform != "linux" or _has_open(self.pid, path)

    def signal(self, path: Path, number: signal.Signals) -> bool:
        """Signal the process, if it provably holds the lock `path`. False when it does not, or is another user's."""
        if self.pid == os.getpid() or not self.holds(path):
            return False
        try:
            os.kill(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def __str__(self) -> str:
        """As a message names it."""
        return f"process {self.pid} ({processes.command_line(self.pid).strip()[:100] or 'gone'})"


@contextlib.contextmanager
def lock(path: Path, what: str, *, timeout_s: float, waiting: Waiting | None = None) -> Iterator[int]:
    """Hold the lock file `path` during the block; yields a descriptor that a child may inherit.

    `waiting` receives the holder's name, as `process 123`. BusyError after `timeout_s` seconds, naming `what`;
    StateError if the file belongs to another user. The kernel drops the lock when its last holder dies, however that
    happens. The file stays, unless the holder removes it during the block, together with the resource that it guards.
    """
    files.private_folder(path.parent)
    deadline = time.monotonic() + timeout_s
    while True:
        handle = _open(path, what)
        try:
            if not _try(handle):
                if waiting is not None and timeout_s > 0:
                    waiting(_told(path))
                with signals.cuttable():
                    while not _try(handle):
                        if time.monotonic() >= deadline:
                            raise BusyError(
                                f"{what} is locked by {_told(path)}, and was for {timeout_s:g} s",
                                hint=f"wait for it, or end that process; the lock is {path}",
                            )
                        time.sleep(POLL_S)
            if not _is_at(handle, path):
                continue  # its holder has removed it, and the next process makes another file
            _note(path)
            try:
                yield handle
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for a child that has inherited it and outlives us
            return
        finally:
            os.close(handle)


def _open(path: Path, what: str) -> int:
    """Open the lock file, or create it. Does not follow a symbolic link."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except PermissionError as error:
        raise StateError(
            f"{what} cannot be locked: {path}, of user {_user_of(path)}: {error.strerror}",
            hint="do it as that user, or as root (sudo)",
        ) from None


def _try(handle: int) -> bool:
    """Lock the open file now; False when another holds it. flock(2) also works over NFS, where the kernel maps it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove the lock files in a folder that no process holds."""
    for path in folder.glob("*.lock"):
        with contextlib.suppress(StateError), lock(path, path.name, timeout_s=0):
            drop(path)
    for owner in folder.glob("*.owner"):
        if not owner.with_suffix(".lock").exists():
            owner.unlink(missing_ok=True)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        there, ours = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def holder(path: Path) -> Holder | None:
    """The process that the note of the lock `path` names, or None; Holder.holds() verifies it."""
    try:
        first, started, digest = files.read_text(owner_file(path)).split("\n")[:3]
        return Holder(int(first.removeprefix("process ")), started, digest)
    except (OSError, ValueError):
        return None


def drop(path: Path) -> None:
    """Remove a lock file and its note. Only its holder may, after the resource that it guards was removed."""
    for leftover in (owner_file(path), path):
        leftover.unlink(missing_ok=True)


def owner_file(path: Path) -> Path:
    """The note that names the holder of the lock `path`."""
    return path.with_suffix(".owner")


def _note(path: Path) -> None:
    """Write the note. It is informative only, so a full disk is no failure."""
    us = Holder.of(os.getpid())
    with contextlib.suppress(OSError):
        owner_file(path).unlink(missing_ok=True)
        owner_file(path).write_text(f"process {us.pid}\n{us.started}\n{us.command_sha256}\n")


def _told(path: Path) -> str:
    """The holder of the lock, for a message."""
    try:
        return files.read_text(owner_file(path)).partition("\n")[0].strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def _user_of(path: Path) -> str:
    """The owner of a file, or of its folder: a name, or a number if there is no name."""
    there = path if path.exists() else path.parent
    try:
        return there.owner()
    except KeyError:
        return str(there.stat().st_uid)


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has the file open; see proc(5)."""
    try:
        wanted = path.stat()
        handles = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for handle in handles:
        with contextlib.suppress(OSError):
            there = handle.stat()
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
