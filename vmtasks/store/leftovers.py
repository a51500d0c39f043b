"""Leftovers of killed processes in a store: unfinished files and folders, stale locks."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vmtasks.errors import StateError
from vmtasks.host import files, locks


def sweep(root: Path, *, dry_run: bool = False) -> Iterator[tuple[Path, int]]:
    """Remove the leftovers of the store `root`; yields each with its bytes, but for locks, which are empty.

    With `dry_run` nothing is removed. Files that are being written stay, and so do partial downloads, which are
    resumed.
    """
    for path in files.abandoned(root):
        yield path, _size(path)
        if not dry_run:
            files.remove(path)
    for path in (root / "downloads").glob("*.unpacked"):
        with suppress(StateError), locks.lock(path.with_suffix(".lock"), path.name, timeout_s=0):
            yield path, path.stat().st_size
            if not dry_run:
                path.unlink(missing_ok=True)
    if not dry_run:
        for name in ("locks", "downloads"):
            locks.sweep(root / name)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(Path(folder, name).lstat().st_size for folder, _, files in os.walk(path) for name in files)
