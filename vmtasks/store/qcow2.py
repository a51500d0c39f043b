"""Reads a qcow2 file without qemu-img: its header, and a digest of samples of its bytes."""

import hashlib
import os
import struct
from pathlib import Path

import msgspec

HEAD = struct.Struct(">4sIQIIQ")
"""Magic, version, offset and length of the backing file's name, cluster bits, virtual size."""
MAGIC = b"QFI\xfb"
LONGEST_NAME = 1023

EDGE, BLOCK, BLOCKS = 64 << 10, 4 << 10, 24
"""Bytes read at each end of a file; size and number of the evenly spaced blocks between."""


class Header(msgspec.Struct, frozen=True):
    """`backing` is the name of the backing file as the header has it, or ''."""

    backing: str
    virtual_size: int


def header(path: Path) -> Header | None:
    """Read the header; None for a file that is absent, cut, or no qcow2."""
    try:
        with path.open("rb") as data:
            magic, version, offset, length, _, size = HEAD.unpack(data.read(HEAD.size))
            if magic != MAGIC or version not in (2, 3) or length > LONGEST_NAME:
                return None
            data.seek(offset)
            name = data.read(length) if offset else b""
    except (OSError, struct.error):
        return None
    return Header(os.fsdecode(name), size) if not offset or len(name) == length else None


def sample(path: Path) -> str:
    """SHA-256 over both ends of a file and blocks between: milliseconds, however large it is. OSError."""
    taken = hashlib.sha256()
    with path.open("rb") as data:
        size = os.fstat(data.fileno()).st_size
        taken.update(f"{size} ".encode())
        taken.update(os.pread(data.fileno(), EDGE, 0))
        for number in range(1, BLOCKS + 1):
            taken.update(os.pread(data.fileno(), BLOCK, size * number // (BLOCKS + 1) // BLOCK * BLOCK))
        taken.update(os.pread(data.fileno(), EDGE, max(0, size - EDGE)))
    return taken.hexdigest()
