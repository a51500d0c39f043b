"""A file to download, the promises about it, and what must be there afterwards."""

import bz2
import hashlib
import random
from pathlib import Path

from httpserver import Site
from vmtasks.installer.download.fetch import fetch
from vmtasks.installer.download.want import Digest, Fetched, Limits, WantedFile

LIMITS = Limits(connect_s=2, stall_s=0.3, total_s=20, attempts=3, backoff_s=0.01, backoff_max_s=0.05)
PLAIN = random.Random(1).randbytes(400_000) + bytes(600_000)  # noqa: S311
PACKED = bz2.compress(PLAIN)
HTML = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
NAME = "os.iso.bz2"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_download(data: bytes = PACKED, algorithm: str = "md5") -> Digest:
    return Digest(algorithm, hashlib.new(algorithm, data).hexdigest(), "download")


def of_content(data: bytes = PLAIN) -> Digest:
    return Digest("sha256", sha256(data))


def want(*sites: Site, name: str = NAME, digests: tuple[Digest, ...] | None = None, **more) -> WantedFile:
    promised = (of_download(), of_content()) if digests is None else digests
    return WantedFile(urls=tuple(site.url(name) for site in sites), name=name, digests=promised, **more)


def get(wanted: WantedFile, folder: Path, **more) -> Fetched:
    return fetch(wanted, folder, **{"limits": LIMITS, **more})


def names(folder: Path, pattern: str = "*") -> list[str]:
    """What is left, but for the lock."""
    return sorted(path.name for path in folder.glob(pattern) if path.suffix not in {".lock", ".owner"})


def assert_whole(got: Fetched, folder: Path, plain: bytes = PLAIN) -> None:
    """The file is right, read-only, and nothing is beside it but its record."""
    assert got.path == folder / sha256(plain)
    assert (got.sha256, got.size) == (sha256(plain), len(plain))
    assert got.path.read_bytes() == plain
    assert got.path.stat().st_mode & 0o777 == 0o444
    assert names(folder) == [got.sha256, f"{got.sha256}.json"]
