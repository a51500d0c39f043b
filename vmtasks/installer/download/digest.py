"""What a file's bytes must hash to: a digest that somebody published, lists of such digests, and the check."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from vmtasks.errors import FetchError

BLOCK = 256 * 1024
"""Bytes read from a file at once."""
HEX_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}

Algorithm = Literal["md5", "sha1", "sha256", "sha512"]
Of = Literal["download", "content"]


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A promise about the file as downloaded (compressed, if it is), or about its content."""

    algorithm: Algorithm
    hex: str
    of: Of = "content"

    def __post_init__(self) -> None:
        """ValueError for a digest that cannot be one; msgspec turns that into its ValidationError."""
        if not re.fullmatch(rf"[0-9a-fA-F]{{{HEX_DIGITS.get(self.algorithm, 0)}}}", self.hex):
            raise ValueError(f"{self.hex!r} is not the hexadecimal form of an {self.algorithm} digest")
        msgspec.structs.force_setattr(self, "hex", self.hex.lower())


def parse_sums(text: str, algorithm: str = "md5") -> dict[str, str]:
    """`MD5 (file) = hex` lines, as BSD has them, and `hex  file`, as GNU has them -> {file: hex}.

    Other lines are skipped. FetchError if a file has two digests.
    """
    hex_ = rf"(?P<hex>[0-9a-f]{{{HEX_DIGITS[algorithm]}}})"
    bsd = re.compile(rf"{algorithm} ?\((?P<name>.+)\) ?= ?{hex_}\s*", re.IGNORECASE)
    gnu = re.compile(rf"{hex_} [ *](?:\./)?(?P<name>.*\S)\s*", re.IGNORECASE)
    sums: dict[str, str] = {}
    for line in text.splitlines():
        match = bsd.fullmatch(line) or gnu.fullmatch(line)
        if match and sums.setdefault(match["name"], match["hex"].lower()) != match["hex"].lower():
            raise FetchError(
                f"the list of sums has two different digests for {match['name']}", hint="use another mirror"
            )
    return sums


def holds(path: Path, digests: Iterable[Digest]) -> bool:
    """Whether the file is there and has all these digests of content."""
    sums = {d: hashlib.new(d.algorithm, usedforsecurity=False) for d in digests}
    try:
        with path.open("rb") as data:
            while block := data.read(BLOCK):
                for sum_ in sums.values():
                    sum_.update(block)
    except FileNotFoundError:
        return False
    return all(sum_.hexdigest() == digest.hex for digest, sum_ in sums.items())
