"""newc archives, as Linux unpacks them into its first file system: written here, byte for byte reproducible."""

import gzip
import stat
from collections.abc import Iterable

from vmtasks.media.tree import Entry, merge

MAGIC = "070701"
TRAILER = "TRAILER!!!"
KINDS = {"dir": stat.S_IFDIR, "file": stat.S_IFREG, "link": stat.S_IFLNK}


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries as a gzip-compressed newc archive; inode numbers count up, times are zero, the owner is root."""
    parts = [
        record(number, entry.path, KINDS[entry.kind] | entry.mode, entry.target.encode() or entry.read())
        for number, entry in enumerate(merge(entries), start=1)
    ]
    parts.append(record(0, TRAILER, 0, b""))
    return gzip.compress(b"".join(parts), compresslevel=9, mtime=0)


def record(number: int, path: str, mode: int, data: bytes) -> bytes:
    """One header of thirteen numbers of eight hexadecimal digits, the name, the data; each padded to four bytes."""
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name), 0)
    head = MAGIC + "".join(f"{field:08x}" for field in fields)
    return pad(head.encode() + name) + pad(data)


def pad(data: bytes) -> bytes:
    """`data` with zero bytes up to a multiple of four."""
    return data + bytes(-len(data) % 4)
