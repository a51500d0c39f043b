"""A .deb file -> what it would install, without root and without its scripts: owns the cache of unpacked packages."""

import shutil
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path
from tarfile import TarError, TarFile, TarInfo
from typing import IO

import msgspec
from debian.arfile import ArError
from debian.debfile import DebError, DebFile

from vmtasks.errors import FetchError
from vmtasks.host import files
from vmtasks.media.tree import Entry, clean


class _Unpacked(msgspec.Struct, frozen=True):
    """One path of an unpacked package as its list keeps it: `data` names a file beside the list."""

    path: str
    kind: str
    mode: int
    data: str = ""
    target: str = ""


def unpack(deb: Path, sha256: str, cache: Path) -> list[Entry]:
    """What a package would install; its scripts are not run. Unpacked once, then kept under its digest.

    The kernel's package takes seconds to decompress, so that this pays at the second composition.
    """
    place = cache.absolute() / "unpacked" / sha256
    listing = place / "entries.json"
    if not listing.exists():
        with files.temporary(place, folder=True) as work:
            beside = work / sha256
            beside.mkdir()
            kept = list(_extract(deb, beside))
            (beside / listing.name).write_bytes(msgspec.json.encode(kept))
            try:
                beside.rename(place)
            except OSError:
                if not listing.exists():  # otherwise another process was faster
                    raise
    known = msgspec.json.decode(listing.read_bytes(), type=list[_Unpacked])
    return [
        Entry(item.path, item.kind, item.mode, place / item.data if item.kind == "file" else "", item.target)  # type: ignore[arg-type]
        for item in known
    ]


def _extract(deb: Path, place: Path) -> Iterator[_Unpacked]:
    """Each member of the data archive; file bytes go to files named by number."""
    try:
        with DebFile(str(deb)) as package:
            data: TarFile = package.data.tgz()
            files: dict[str, _Unpacked] = {}
            for number, member in enumerate(data):
                item = _member(member, number, files, data, place)
                if item is not None and item.path:
                    files[item.path] = item
            yield from files.values()
    except OSError as error:
        if error.errno is not None:
            raise FetchError(f"{deb.name} could not be unpacked into {place.parent}: {error.strerror}") from error
        raise FetchError(f"{deb} is not a Debian package that can be unpacked: {error}") from error
    except (ArError, DebError, EOFError, LZMAError, TarError, ValueError, zlib.error) as error:
        raise FetchError(f"{deb} is not a Debian package that can be unpacked: {error}") from error


def _member(member: TarInfo, number: int, known: dict[str, _Unpacked], data: TarFile, place: Path) -> _Unpacked | None:
    path = clean(member.name)
    if member.isdir():
        return _Unpacked(path, "dir", member.mode)
    if member.issym():
        return _Unpacked(path, "link", 0o777, target=member.linkname)
    if member.islnk():
        return msgspec.structs.replace(known[clean(member.linkname)], path=path)
    stream: IO[bytes] | None = data.extractfile(member)
    if stream is None:
        return None  # a device or a pipe, which no package that we use holds
    with stream, (place / f"{number:05}").open("wb") as out:
        shutil.copyfileobj(stream, out)
    return _Unpacked(path, "file", member.mode, data=f"{number:05}")
