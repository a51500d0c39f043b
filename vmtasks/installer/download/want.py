"""A file that is wanted: where it is to be had, what is known of it, how long to try, and what came of it."""

import hashlib
import re
from pathlib import Path
from typing import Literal

import msgspec

from vmtasks.errors import FetchError
from vmtasks.installer.download.decompress import STREAMS
from vmtasks.installer.download.digest import Digest


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """One file: where it is to be had, best first, and what is known of it. `size`: bytes of its content."""

    urls: tuple[str, ...]
    name: str
    digests: tuple[Digest, ...] = ()
    compression: Literal["auto", "", "bz2", "gz", "xz"] = "auto"
    size: int | None = None

    @property
    def packing(self) -> str:
        """`compression`, or what the end of the name says."""
        suffix = self.name.rpartition(".")[2]
        return (suffix if suffix in STREAMS else "") if self.compression == "auto" else self.compression

    @property
    def promises(self) -> frozenset[Digest]:
        """The digests; what is not compressed has only a content."""
        if self.packing:
            return frozenset(self.digests)
        return frozenset(Digest(digest.algorithm, digest.hex) for digest in self.digests)


class Limits(msgspec.Struct, frozen=True):
    """How long to go on, in seconds; `attempts` count per URL, anew whenever more has arrived than ever before."""

    connect_s: float = 20
    stall_s: float = 30
    total_s: float = 4 * 3600
    attempts: int = 5
    backoff_s: float = 1
    backoff_max_s: float = 30


class Fetched(msgspec.Struct, frozen=True):
    """The file; its size in bytes; `verified` is False when nothing was known to hold it against."""

    path: Path
    sha256: str
    size: int
    url: str
    verified: bool


def shown(url: str) -> str:
    """A URL as it may be printed and stored: without a password."""
    return re.sub(r"//[^/@]*@", "//", url)


def stem(want: Want) -> str:
    """One name for all fetches of one file, whichever mirror they use."""
    if not re.fullmatch(r"[^/\0\s.][^/\0]{0,150}", want.name):
        raise FetchError(f"{want.name!r} is not the name of a file", hint="check the configuration")
    what = sorted(map(str, want.promises)) or [*map(shown, want.urls)]
    return f"{want.name}.{hashlib.sha256(msgspec.json.encode([what, want.packing])).hexdigest()[:12]}"
