"""Entries -> ISO 9660 with Rock Ridge, reproducible byte for byte. Owns pycdlib."""

import io
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import struct_time
from typing import Any

from pycdlib import PyCdlib, dates, headervd, pycdlib, udf, utils
from pycdlib.pycdlibexception import PyCdlibException

from vmtasks.errors import ImageError
from vmtasks.host.files import replacing
from vmtasks.media.tree import Entry, merge

BOOT_SECTORS = 4
"""Sectors of 512 bytes of the boot image that the firmware loads; the image loads the rest itself."""

EPOCH = 946684800
"""The time of all files on an ISO, 2000-01-01T00:00:00Z: a year that old readers with two-digit fields support."""

NAME_MAX = 248
"""Longest name in bytes: one Rock Ridge NM field with its header fits the directory record's continuation area."""


@dataclass(frozen=True)
class Boot:
    """El Torito without emulation: `image` and `catalog` are paths on the ISO; the image is among the entries."""

    image: str
    catalog: str = "boot.cat"


class _Clock:
    """The `time` module for pycdlib while an ISO is written: stopped, and in UTC."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return float(EPOCH)

    def localtime(self, seconds: float | None = None) -> struct_time:
        return time.gmtime(EPOCH if seconds is None else seconds)


@contextmanager
def frozen_clock() -> Iterator[None]:
    """Stop the clock in pycdlib: it writes time stamps, and has no parameter for the time."""
    modules = [module for module in (dates, headervd, pycdlib, udf, utils) if hasattr(module, "time")]
    for module in modules:
        setattr(module, "time", _Clock())  # noqa: B010 - the modules do not declare that they export it
    try:
        yield
    finally:
        for module in modules:
            setattr(module, "time", time)  # noqa: B010


def write_iso(out: Path, entries: Iterable[Entry], *, label: str, boot: Boot | None = None) -> None:
    """Write `entries` to `out`, whole or not at all.

    The same entries, label and boot give the same bytes, whatever the time, time zone, umask and order of the entries.
    Rock Ridge 1.09 keeps modes, links and names of any characters. ImageError for an entry that it cannot represent.
    """
    tree = merge(entries)
    with ExitStack() as stack:
        stack.enter_context(frozen_clock())
        iso = PyCdlib()
        try:
            iso.new(interchange_level=4, rock_ridge="1.09", vol_ident=label, sys_ident="", app_ident_str="")
            stack.callback(iso.close)
            ids = _fill(iso, tree, stack)
            if boot is not None:
                _make_bootable(iso, boot, ids)
            beside = stack.enter_context(replacing(out))
            iso.write(str(beside))
        except (OSError, PyCdlibException, UnicodeError) as error:
            raise ImageError(f"{out} cannot be written: {error}") from error


def _fill(iso: "PyCdlib", tree: list[Entry], stack: ExitStack) -> dict[str, str]:
    """Add all entries; returns path -> ISO path."""
    ids = {"": ""}
    for number, entry in enumerate(tree):
        folder, _, name = entry.path.rpartition("/")
        check_name(name, entry.path)
        iso_path = ids[entry.path] = f"{ids[folder]}/{iso_name(name, number)}"
        if entry.kind == "dir":
            iso.add_directory(iso_path, rr_name=name, file_mode=0o040000 | entry.mode)
        elif entry.kind == "link":
            iso.add_symlink(iso_path, name, entry.target)
        else:
            stream = stack.enter_context(opened(entry))
            iso.add_fp(stream, entry.size, iso_path, rr_name=name, file_mode=0o100000 | entry.mode)
    return ids


def opened(entry: Entry) -> Any:
    """The bytes of a file as a stream that pycdlib reads later; it holds no file descriptor until then."""
    return _Late(entry.data) if isinstance(entry.data, Path) else io.BytesIO(entry.read())


class _Late(io.RawIOBase):
    """A file that is open only while it is read: an ISO may have more files than a process may open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._at = 0
        self._size = path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        with self._path.open("rb") as stream:
            stream.seek(self._at)
            data = stream.read(size)
        self._at += len(data)
        return data


def check_name(name: str, path: str) -> None:
    """ImageError when Rock Ridge cannot hold `name`."""
    raw = name.encode("utf-8", "strict")
    if len(raw) > NAME_MAX or b"\0" in raw:
        raise ImageError(f"{path!r} has a name that an ISO cannot hold: at most {NAME_MAX} bytes, none of them zero")


def iso_name(name: str, number: int) -> str:
    """The name for readers without Rock Ridge: lower-case ASCII unchanged, any other by its number in the tree."""
    plain = all(char.isascii() and (char.isalnum() or char in "._-+") for char in name)
    return name if plain and len(name) <= 100 and name.strip(".") else f"_{number:05}"


def _make_bootable(iso: "PyCdlib", boot: Boot, ids: dict[str, str]) -> None:
    if boot.image not in ids:
        raise ImageError(f"the boot image {boot.image} is not among the files of the ISO")
    folder, _, name = boot.catalog.rpartition("/")
    if folder not in ids or boot.catalog in ids:
        raise ImageError(f"the boot catalog {boot.catalog} needs a folder that exists and a name that is free")
    iso.add_eltorito(
        ids[boot.image],
        bootcatfile=f"{ids[folder]}/{name}",
        rr_bootcatname=name,
        boot_load_size=BOOT_SECTORS,
        boot_info_table=True,
    )
