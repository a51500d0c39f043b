"""Files that are whole or absent: write beside, fsync, rename. All temporary names are made and recognised here."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

NAME_BYTES = 200
"""Bytes of the final name that a temporary name repeats; a name may have 255."""

TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.new")
FORMER = re.compile(r"\..+\.[a-z0-9_]{8}|\.(?:fetch|new)-.+")
"""Temporary names of former versions, which held no lock."""
FORMER_S = 24 * 3600.0
"""The age from which one of those counts as abandoned."""

RECORD_BYTES = 64 << 20
"""The largest record or key that is read."""


@contextmanager
def temporary(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Make a new file or folder beside `path`. It is removed at the end, unless it was renamed.

    A lock on it is held while the block runs, which tells abandoned() that its maker lives. A program that writes it
    must therefore not replace the file; give such a program a name in a temporary folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, handle = _make(path, folder=folder)
    try:
        yield beside
    finally:
        try:
            remove(beside)
        finally:
            os.close(handle)


def _make(path: Path, *, folder: bool) -> tuple[Path, int]:
    prefix = f".{os.fsdecode(os.fsencode(path.name)[:NAME_BYTES])}."
    while True:
        if folder:
            name = tempfile.mkdtemp(prefix=prefix, suffix=".new", dir=path.parent)
            handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        else:
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=".new", dir=path.parent)
        beside, ours = Path(name), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except OSError:
            pass  # a file system without locks: abandoned() finds nothing there
        if ours and os.path.lexists(beside):
            return beside, handle
        os.close(handle)  # another process removed it before it was locked
        remove(beside)


def is_temporary(name: str) -> bool:
    """Whether this is the name of an unfinished file or folder."""
    return bool(TEMPORARY.fullmatch(name) or FORMER.fullmatch(name))


def abandoned(root: Path) -> Iterator[Path]:
    """Yield temporary files below `root` whose maker is gone. Each may be removed until the next is asked for."""
    for folder, folders, files in os.walk(root):
        for name in sorted(filter(is_temporary, [*folders, *files])):
            path = Path(folder, name)
            with suppress(OSError), _locked(path):
                if TEMPORARY.fullmatch(name) or time.time() - path.lstat().st_mtime > FORMER_S:
                    yield path
        folders[:] = [name for name in folders if not is_temporary(name)]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file. OSError if it is in use, or if that is unknown."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at `path`, whether it exists yet or not. OSError."""
    return shutil.disk_usage(nearest_folder(path)).free


@contextmanager
def opened(path: Path | bytes, *, follow: bool = True) -> Iterator[BufferedReader]:
    """Open a file to read it. OSError, also for a device or a pipe: reading one may never end.

    Without `follow` also for a symbolic link.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
            raise OSError(kind, "Is a directory" if kind == errno.EISDIR else "Is no file", os.fsdecode(path))
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def sha256(path: Path | bytes) -> str:
    """SHA-256 (hex) of a file of any size. OSError, also for a path that is not a file."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> bytes:
    """Read a whole record or key. OSError, also for a path that is not a file or is larger than RECORD_BYTES."""
    with opened(path) as file:
        data = file.read(RECORD_BYTES + 1)
    if len(data) > RECORD_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def read_text(path: Path, errors: str = "strict") -> str:
    """As read(), for UTF-8 text. ValueError for other bytes, unless `errors` says otherwise."""
    return read(path).decode(errors=errors)


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it, set `mode` and rename it over `path`.

    On failure the temporary file is removed and `path` is unchanged. OSError as the file system raises it.
    """
    with temporary(path) as beside:
        yield beside
        publish(beside, path, mode)


def publish(beside: Path, path: Path, mode: int = 0o644) -> None:
    """Make a complete file durable, and rename it to `path`."""
    with beside.open("rb+") as done:
        os.fchmod(done.fileno(), mode)
        os.fsync(done.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def write(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Write `data` to `path`, all of it or nothing. OSError that names the path."""
    try:
        with replacing(path, mode) as beside:
            beside.write_bytes(data if isinstance(data, bytes) else data.encode())
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_if_changed(path: Path, data: bytes | str, mode: int = 0o644) -> bool:
    """As write(), but skip a file that already has `data` and `mode`. True if it was written."""
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


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter: disks and logs hold host keys. An existing one keeps its mode.

    OSError as the file system raises it; NotADirectoryError for a path that is not a folder.
    """
    if path.is_dir():
        return
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except FileExistsError:  # a file or a device
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
