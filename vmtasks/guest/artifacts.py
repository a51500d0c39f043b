"""Regular files of a guest -> a new folder here, within limits of size and time. The guest is not trusted.

The guest lists the matches of the patterns, then sends a tar of the regular files among them. Neither is trusted: only
files that were listed and requested are written, each once, below a new folder. Links, devices, sockets and FIFOs stay
in the guest. Everything left there is reported.
"""

import errno
import io
import os
import shlex
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from vmtasks import printable
from vmtasks.config.load import show_size
from vmtasks.errors import CommandTimeoutError, SshError
from vmtasks.host import process

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection

FILES = 20_000
"""The maximum number of files and folders."""
LIST_BYTES = 8 << 20
HEADERS_BYTES = 2048
"""Overhead of tar for each file: headers, a long name, padding."""
META_BYTES = 1 << 16
"""The maximum size of a header: tarfile reads headers into memory, and no name needs more."""
NAMES_SHOWN = 5
"""How many names are listed for the same reason."""
BLOCK = 1 << 18
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL

NAME_ERRORS = (errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of a file system that refuses a name. All others are failures of this host, such as a full disk."""

# All names begin with ./ and no marker does. Not every find has -printf; not every tar reads NUL-terminated names.
LIST = r"""
list() {
    printf 'pattern\0'
    [ -e "$1" ] || [ -L "$1" ] || return 0
    printf 'file\0'; find "$@" -type f ! -size +@LIMIT@c -print0
    printf 'large\0'; find "$@" -type f -size +@LIMIT@c -print0
    printf 'folder\0'; find "$@" -type d -print0
    printf 'other\0'; find "$@" ! -type f ! -type d -print0
}
"""
# GNU tar reads a backslash in a name as an escape, unless --no-unquote is given; other tars have no such option.
SEND = "plain=; tar --help 2>&1 | grep -q no-unquote && plain=--no-unquote\nexec xargs -0 tar $plain -cf -"


@dataclass
class Fetched:
    """The files received. `left` maps each name or pattern left in the guest, relative to the folder, to the reason."""

    files: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)

    def messages(self) -> Iterator[str]:
        """Yield one line for each thing left in the guest, safe for a terminal."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            yield from (f"{printable.line(name)}: {why}" if name else why for name in names[:NAMES_SHOWN])
            if len(names) > NAMES_SHOWN:
                yield f"and {len(names) - NAMES_SHOWN} more: {why}"


class _FullError(Exception):
    """The guest sent more than the limit."""


def fetch(
    connection: "Connection",
    cwd: str,
    dest: Path,
    *,
    names: Sequence[str],
    globs: Sequence[str],
    limit: int,
    timeout_s: float,
) -> Fetched:
    """Copy the files `names`, and what `globs` match below `cwd` in the guest, to the new folder `dest`.

    A folder is copied with its contents. `limit` is in bytes, for all files together. Files keep their mtime and
    executable bit. OSError when `dest` cannot be written.
    """
    deadline, done = time.monotonic() + timeout_s, Fetched()
    dest.mkdir()
    words = {name: f"./{shlex.quote(name)}" for name in names} | {glob: f"./{shell_glob(glob)}" for glob in globs}
    if not words:
        return done
    said = _list(connection, cwd, tuple(words.values()), limit, deadline, done)
    found = _Listing(tuple(words), limit, done)
    for token in said.split(b"\0")[:-1]:
        found.take(token)
    for name in found.folders:
        with _noting_bad_name(name, done):
            (dest / name).mkdir(parents=True, exist_ok=True)
    if found.files:
        with tempfile.TemporaryFile(dir=dest.parent) as archive:
            whys = [_receive(connection, cwd, found.files, archive, limit, deadline)]
            whys += [_unpack(archive, dest, found.files, limit, done), "the guest did not send it"]
        for name in found.files:
            if name not in done.files:
                done.left.setdefault(name, next(filter(None, whys)))
    return done


def shell_glob(pattern: str) -> str:
    """A glob as a shell word: everything is quoted but `*`, `?` and bracket expressions."""
    return "".join(c if c in "*?[]-" else shlex.quote(c) for c in pattern)


# -- listing


def _list(
    connection: "Connection", cwd: str, words: Sequence[str], limit: int, deadline: float, done: Fetched
) -> bytes:
    """The guest's answer to LIST, truncated at LIST_BYTES."""
    text = LIST.replace("@LIMIT@", str(limit)) + "\n".join(f"list {word}" for word in words)
    said = bytearray()

    def take(data: bytes) -> None:
        said.extend(data[: LIST_BYTES - len(said)])
        if len(said) == LIST_BYTES:
            raise _FullError

    try:
        if why := _run(connection, text, cwd, take, deadline):
            done.left[""] = f"not all could be listed: {why}"
    except _FullError:
        done.left[""] = f"more than {FILES} files and folders: the rest was left in the guest"
    return bytes(said)


class _Listing:
    """Parses the guest's answer to LIST, and records names that cannot be fetched."""

    def __init__(self, patterns: Sequence[str], limit: int, done: Fetched) -> None:
        self.files: dict[str, None] = {}
        self.folders: dict[str, None] = {}
        self._patterns = iter(patterns)
        self._pattern = self._kind = ""
        self._limit = limit
        self._done = done

    def take(self, token: bytes) -> None:
        """Parse a marker, or the name of a file."""
        if token.startswith(b"./"):
            self._name(PurePosixPath(os.fsdecode(token[2:])))
        elif token == b"pattern":
            self._pattern = next(self._patterns, "")
            self._done.left[self._pattern] = "there is nothing of this name in the guest"
        else:
            self._done.left.pop(self._pattern, None)
            self._kind = token.decode(errors="replace")

    def _name(self, path: PurePosixPath) -> None:
        name, left = str(path), self._done.left
        if path.is_absolute() or ".." in path.parts:
            left[name] = "its name leads out of the folder"
        elif self._kind == "large":
            left[name] = f"left in the guest: it is larger than {show_size(self._limit)}"
        elif self._kind == "other":
            left[name] = "left in the guest: it is a link, or not a regular file"
        elif len(self.files) + len(self.folders) >= FILES:
            left[""] = f"more than {FILES} files and folders: the rest was left in the guest"
        elif path.parts:
            (self.folders if self._kind == "folder" else self.files)[name] = None


# -- receiving


def _receive(
    connection: "Connection", cwd: str, wanted: Mapping[str, None], archive: IO[bytes], limit: int, deadline: float
) -> str:
    """Receive a tar of these files, up to the limit; returns why it is incomplete, or ''."""
    most = limit + HEADERS_BYTES * (len(wanted) + 16)

    def take(data: bytes) -> None:
        archive.write(data)
        if archive.tell() > most:
            raise _FullError

    names = b"".join(b"./" + os.fsencode(name) + b"\0" for name in wanted)
    try:
        return _run(connection, SEND, cwd, take, deadline, stdin=names)
    except _FullError:
        return _over_limit(limit)


class _Member(tarfile.TarInfo):
    """A header of bounded length."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if not (self.isfile() or self.isdir() or self.islnk()) and self.size > META_BYTES:
            raise tarfile.ReadError("a header is too long")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]  # tarfile documents this override
        return member


def _unpack(archive: IO[bytes], dest: Path, wanted: Mapping[str, None], limit: int, done: Fetched) -> str:
    """Write the requested files; returns why some may be missing, or ''."""
    archive.seek(0)
    left = limit
    try:
        # For many names xargs runs tar several times: the archives are concatenated.
        with tarfile.open(
            fileobj=archive, mode="r:", tarinfo=_Member, ignore_zeros=True, encoding="utf-8", errors="surrogateescape"
        ) as members:
            while (member := members.next()) is not None:
                members.members = []  # type: ignore[attr-defined]  # else it keeps every member
                name = str(PurePosixPath(member.name))
                if name in wanted and name not in done.files:
                    left -= _write(members, member, dest, name, left, done)
                if left < 0:
                    return _over_limit(limit)
    except (tarfile.TarError, OverflowError, RecursionError, ValueError):
        return "the guest sent a truncated or invalid tar"
    return ""


def _write(members: tarfile.TarFile, member: tarfile.TarInfo, dest: Path, name: str, most: int, done: Fetched) -> int:
    """Write one file, unless it is too large; returns its size. A hard link becomes a copy."""
    first, place = str(PurePosixPath(member.linkname)), dest / name
    if member.islnk() and first in done.files:
        size = (dest / first).stat().st_size
    elif member.isreg() and not member.issparse():
        size = member.size
    else:
        return 0
    if size > most:
        return size
    with _noting_bad_name(name, done):
        place.parent.mkdir(parents=True, exist_ok=True)
        data = (dest / first).open("rb") if member.islnk() else members.extractfile(member)
        mode = 0o777 if member.mode & 0o100 else 0o666
        with data or io.BytesIO() as source, os.fdopen(os.open(place, NEW, mode), "wb") as out:
            try:
                shutil.copyfileobj(source, out, BLOCK)
            except BaseException:
                place.unlink()
                raise
        with suppress(OSError, OverflowError, TypeError, ValueError):
            os.utime(place, (member.mtime, member.mtime))
        done.files.add(name)
        return size
    return 0


@contextmanager
def _noting_bad_name(name: str, done: Fetched) -> Iterator[None]:
    """Record a name that this host's file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        done.left[name] = f"this host cannot store a file of this name: {error.strerror}"


def _over_limit(limit: int) -> str:
    return f"left in the guest: all files together are larger than {show_size(limit)} (artifacts_limit)"


def _run(
    connection: "Connection", text: str, cwd: str, take: Callable[[bytes], None], deadline: float, stdin: bytes = b""
) -> str:
    """Run a script in the guest and pass its output to `take`; returns why it failed, or ''."""
    errors = process.Head()
    try:
        ended = connection.execute(
            text,
            cwd=cwd,
            stdin=stdin,
            timeout_s=max(0.1, deadline - time.monotonic()),
            on_data=lambda data, stream: take(data) if stream == "stdout" else errors(data),
            keep=False,
        )
    except CommandTimeoutError:
        return "the time limit was reached (artifacts_timeout_s)"
    except SshError as error:
        return f"the connection broke: {error.message}"
    said = [printable.line(line) for line in errors.text.splitlines() if line.strip()]
    return (said[0] if said else f"status {ended.status}") if ended.status else ""
