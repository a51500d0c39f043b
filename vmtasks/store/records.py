"""Records: what is known of an image and of an installer, and how any record is read and written."""

import hashlib
import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from vmtasks.host import files

R = TypeVar("R", bound=msgspec.Struct)
J = TypeVar("J")
LONG_TEXT = re.compile(r"""(?m)^((?:[\w-]+|"[^"\\]*") = |    )"([^"\\']{32,})"(,?)$""")
"""A digest, say, as tomli_w writes it. As a literal string it is read ten times as fast, and runs read many."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a published image. Sizes in bytes, times in seconds since 1970 or of duration.

    Images of older versions have neither `file` nor `sample`. `parts` are those of its node in the plan.
    """

    digest: str
    guest: str
    version: str
    name: str
    size: int
    mtime_ns: int
    sha256: str
    virtual_size: int
    backing: str = ""
    backing_sha256: str = ""
    ssh_user: str = ""
    host_keys: list[str] = []
    created: float = 0.0
    duration_s: float = 0.0
    accel: str = ""
    qemu: str = ""
    file: str = ""
    sample: str = ""
    parts: dict[str, str] = {}

    @property
    def stem(self) -> str:
        """The name of the image's file, without `.qcow2`."""
        return self.file or self.digest

    @property
    def chain(self) -> str:
        """Digest of this image's bytes and of its whole backing chain; a child's record has it as `backing_sha256`."""
        own_and_below = f"{self.sha256} {self.backing_sha256}"
        return hashlib.sha256(own_and_below.encode()).hexdigest() if self.backing else self.sha256


class MediaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An installer: the ISO's digest and size, where it came from, and the packages that it was composed of.

    `verified` names the source of its digest; '': none was known, and the user allowed that. `parts`: what
    `recipe` is the digest of.
    """

    sha256: str
    size: int
    mtime_ns: int
    origin: str
    recipe: str
    packages: list[str] = []
    local_packages: dict[str, list[str]] = {}
    verified: str = ""
    parts: dict[str, str] = {}


def read_record(path: Path, kind: type[R]) -> R | None:
    """Read a record; None when it is absent, damaged or of another format."""
    try:
        return load_record(path, kind)
    except (OSError, ValueError):
        return None


def read_json(path: Path, kind: type[J]) -> J | None:
    """As read_record(), of one that is kept as JSON."""
    try:
        return msgspec.json.decode(files.read(path), type=kind)
    except (OSError, ValueError):
        return None


def load_record(path: Path, kind: type[R]) -> R:
    """Read a record. OSError when it cannot be read, ValueError when it is damaged."""
    return msgspec.convert(_parsed(files.read_text(path)), kind)


@lru_cache(maxsize=512)
def _parsed(text: str) -> dict[str, Any]:
    """Parse a record; cached, because a no-op run reads most of them twice or more."""
    return tomllib.loads(text)


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Write a record, whole or not at all."""
    files.write(path, LONG_TEXT.sub(r"\1'\2'\3", tomli_w.dumps(msgspec.to_builtins(record))))
