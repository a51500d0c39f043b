"""One writer at a time, across processes: a lock that dies with its holder, and tells who that is. Owns filelock."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vmtasks.errors import StateError

Waiting = Callable[[str], None]


@contextlib.contextmanager
def lock(path: Path, what: str, *, timeout_s: float, waiting: Waiting | None = None) -> Iterator[int]:
    """Hold the lock file `path` for the length of the block; gives a descriptor that a child may inherit.

    `waiting` is told once who holds it, as `process 123`. StateError after `timeout_s` seconds, naming `what`. The
    kernel drops the lock when its last holder dies, however that happens; the file stays, because removing it races.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 - 20 ms

    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.with_suffix(".owner")
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        holder = _read(owner) or "another process"
        if waiting is not None and timeout_s > 0:
            waiting(holder)
        try:
            held.acquire(timeout=timeout_s, poll_interval=0.1)
        except Timeout:
            raise StateError(
                f"{what} is locked by {_read(owner) or 'another process'}, and was for {timeout_s:g} s",
                hint=f"wait for it, or end that process; the lock is {path}",
            ) from None
    # A copy of the descriptor, for a QEMU to inherit: filelock closes its own in every forked child.
    shared = os.dup(int(held._context.lock_file_fd))  # type: ignore[arg-type]  # noqa: SLF001 - it has no other door
    try:
        owner.write_text(f"process {os.getpid()}")
        yield shared
    finally:
        os.close(shared)
        held.release()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
