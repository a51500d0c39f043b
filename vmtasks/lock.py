"""One writer at a time, across processes: a lock that dies with its holder, and tells who that is. Owns filelock."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vmtasks import interrupts
from vmtasks.errors import StateError

Waiting = Callable[[str], None]


@contextlib.contextmanager
def lock(path: Path, what: str, *, timeout_s: float, waiting: Waiting | None = None) -> Iterator[int]:
    """Hold the lock file `path` for the length of the block; gives a descriptor that a child may inherit.

    `waiting` is told once who holds it, as `process 123`. StateError after `timeout_s` seconds, naming `what`. The
    kernel drops the lock when its last holder dies, however that happens. The file stays, unless the holder of the lock
    removes it while the block runs, together with what it guards.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 - 20 ms

    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.with_suffix(".owner")
    deadline = time.monotonic() + timeout_s
    while True:
        held = FileLock(path)
        try:
            held.acquire(timeout=0)
        except Timeout:
            holder = _read(owner) or "another process"
            if waiting is not None and timeout_s > 0:
                waiting(holder)
            try:
                with interrupts.cuttable():
                    held.acquire(timeout=max(0.0, deadline - time.monotonic()), poll_interval=0.1)
            except Timeout:
                raise StateError(
                    f"{what} is locked by {_read(owner) or 'another process'}, and was for {timeout_s:g} s",
                    hint=f"wait for it, or end that process; the lock is {path}",
                ) from None
        if _is_at(held._context.lock_file_fd, path):  # noqa: SLF001 - it has no other door
            break
        held.release()  # its holder has removed it: whoever comes now makes and locks another file
    # A copy of the descriptor, for a QEMU to inherit: filelock closes its own in every forked child.
    shared = os.dup(int(held._context.lock_file_fd))  # type: ignore[arg-type]  # noqa: SLF001 - it has no other door
    try:
        owner.write_text(f"process {os.getpid()}")
        yield shared
    finally:
        os.close(shared)
        held.release()


def sweep(folder: Path) -> None:
    """Remove the lock files in a folder that nobody holds: whoever comes next makes one anew."""
    for path in folder.glob("*.lock"):
        with contextlib.suppress(StateError), lock(path, path.name, timeout_s=0):
            path.with_suffix(".owner").unlink(missing_ok=True)
            path.unlink()
    for owner in folder.glob("*.owner"):
        if not owner.with_suffix(".lock").exists():
            owner.unlink(missing_ok=True)


def _is_at(descriptor: int | None, path: Path) -> bool:
    """Whether the open file still is what `path` names."""
    if descriptor is None:
        return False
    try:
        there, ours = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
