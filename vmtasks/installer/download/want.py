"""PURE: a wanted file: its URLs, what its bytes must hash to, how long to try."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from vmtasks.config.tables import Download
from vmtasks.errors import FetchError

HEX_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}

Algorithm = Literal["md5", "sha1", "sha256", "sha512"]
Of = Literal["download", "content"]


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A promise about the file as downloaded (compressed, if it is), or about its content."""

    algorithm: Algorithm
    hex: str
    of: Of = "content"

    def __post_init__(self) -> None:
        """ValueError for a digest of the wrong form; msgspec turns that into its ValidationError."""
        if not re.fullmatch(rf"[0-9a-fA-F]{{{HEX_DIGITS.get(self.algorithm, 0)}}}", self.hex):
            raise ValueError(f"{self.hex!r} is not the hexadecimal form of an {self.algorithm} digest")
        msgspec.structs.force_setattr(self, "hex", self.hex.lower())

    @classmethod
    def parse(cls, text: str) -> "Digest":
        """`md5:HEX of download`; config.tables has checked its form."""
        algorithm, hex_, of = text.replace(" of ", ":").split(":")
        return msgspec.convert({"algorithm": algorithm, "hex": hex_, "of": of}, cls)


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


class WantedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file: its URLs, best first, and what is known of it. `size`: bytes of its content."""

    urls: tuple[str, ...]
    name: str
    digests: tuple[Digest, ...] = ()
    compression: Literal["auto", "", "bz2", "gz", "xz"] = "auto"
    size: int | None = None

    @property
    def packing(self) -> str:
        """`compression`, or what the end of the name says."""
        if self.compression != "auto":
            return self.compression
        suffix = self.name.rpartition(".")[2]
        return suffix if suffix in ("bz2", "gz", "xz") else ""

    @property
    def promises(self) -> frozenset[Digest]:
        """The digests; what is not compressed has only a content."""
        if self.packing:
            return frozenset(self.digests)
        return frozenset(Digest(digest.algorithm, digest.hex) for digest in self.digests)

    @property
    def stem(self) -> str:
        """One file name for all fetches of this file, whichever mirror they use. FetchError for an impossible name."""
        if not re.fullmatch(r"[^/\0\s.][^/\0]{0,150}", self.name):
            raise FetchError(f"{self.name!r} is not the name of a file", hint="check the configuration")
        what = sorted(map(str, self.promises)) or [*map(shown, self.urls)]
        return f"{self.name}.{hashlib.sha256(msgspec.json.encode([what, self.packing])).hexdigest()[:12]}"


class Limits(msgspec.Struct, frozen=True):
    """How long to go on, in seconds; `attempts` count per URL, from 1 again whenever more has arrived than before."""

    connect_s: float = 20
    stall_s: float = 30
    total_s: float = 4 * 3600
    attempts: int = 5
    backoff_s: float = 1
    backoff_max_s: float = 30


class Fetched(msgspec.Struct, frozen=True):
    """The file; its size in bytes; `verified` is False when there was no digest to compare."""

    path: Path
    sha256: str
    size: int
    url: str
    verified: bool


class Record(msgspec.Struct, frozen=True):
    """What `<sha256>.json` holds."""

    name: str
    url: str
    size: int
    digests: frozenset[Digest]


def shown(url: str) -> str:
    """A URL as it may be printed and stored: without a password."""
    return re.sub(r"//[^/@]*@", "//", url)


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """One version's file. `folders` are addresses without a slash at the end, best first; `digests` may be empty."""

    name: str
    version: str
    folders: tuple[str, ...]
    digests: tuple[Digest, ...]
    sums: str
    known: tuple[str, ...]
    size: int | None

    @property
    def identity(self) -> list[object]:
        """What decides the bytes: with a digest, the mirrors do not."""
        promised = sorted(map(str, self.digests))
        return [self.name, promised] if promised else [self.name, self.sums, self.folders]

    @property
    def described(self) -> str:
        """`version 6.4.2`, as a message has it."""
        return f"version {self.version}" if self.version else "this guest, which has no version"

    def urls(self, name: str) -> tuple[str, ...]:
        """Where a file beside it is."""
        return tuple(f"{folder}/{name}" for folder in self.folders)


def release(made: Download, version: str, environ: Mapping[str, str]) -> Release:
    """What [installer] says about `version`; a mirror that the environment names takes the place of the others."""
    name = made.file.replace("{version}", version)
    other = environ.get(made.mirror_env, "").strip() if made.mirror_env else ""
    return Release(
        name=name,
        version=version,
        folders=tuple(_folder(at.replace("{version}", version), name) for at in ([other] if other else made.mirrors)),
        digests=tuple(map(Digest.parse, made.digests.get(version, []))),
        sums=made.sums,
        known=tuple(sorted(made.digests)),
        size=made.sizes.get(version),
    )


def _folder(mirror: str, name: str) -> str:
    """A mirror's address as it is put before a name. The file's own address is accepted, and so is a relative path."""
    here = mirror if ":/" in mirror else str(Path(mirror).expanduser().absolute())
    return here.rstrip("/").removesuffix(f"/{name}")
