"""Files that are whole or absent: write beside, fsync, rename."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it, set `mode` and rename it over `path`.

    On failure the temporary file is removed and `path` is as it was. OSError as the file system raises it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:60]}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb+") as done:
            os.fchmod(done.fileno(), mode)
            os.fsync(done.fileno())
        beside.rename(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Put `data` at `path`, all of it or nothing."""
    with replacing(path, mode) as beside:
        beside.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_if_changed(path: Path, data: bytes | str, mode: int = 0o644) -> bool:
    """As write(), but leave a file alone that already holds `data` with `mode`. True if it was written."""
    raw = data if isinstance(data, bytes) else data.encode()
    if path.is_file() and path.stat().st_mode & 0o777 == mode and path.read_bytes() == raw:
        return False
    write(path, raw, mode)
    return True


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
