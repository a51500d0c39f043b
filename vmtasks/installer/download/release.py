"""The installer that a guest's maker publishes: which file, from which mirrors, held against which digest."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vmtasks.config.tables import Download
from vmtasks.errors import FetchError
from vmtasks.host import progress
from vmtasks.host.progress import Say
from vmtasks.installer.download.digest import HEX_DIGITS, Digest, parse_sums
from vmtasks.installer.download.fetch import fetch
from vmtasks.installer.download.meter import Meter, megabytes
from vmtasks.installer.download.want import Fetched, Limits, Want

SUMS_LIMITS = Limits(total_s=120, attempts=2)
SUMS_BYTES = 1_000_000
"""A list of sums that is longer is none."""


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


def release(made: Download, version: str, environ: Mapping[str, str] = os.environ) -> Release:
    """What [installer] says about `version`, with the mirror that the environment puts in place of the others."""
    name = made.file.replace("{version}", version)
    other = environ.get(made.mirror_env, "").strip() if made.mirror_env else ""
    return Release(
        name=name,
        version=version,
        folders=tuple(_folder(at.replace("{version}", version), name) for at in ([other] if other else made.mirrors)),
        digests=tuple(map(_digest, made.digests.get(version, []))),
        sums=made.sums,
        known=tuple(sorted(made.digests)),
        size=made.sizes.get(version),
    )


def obtain(wanted: Release, folder: Path, note: Say, *, allow_unverified: bool = False) -> tuple[Fetched, str]:
    """The file, in `folder`, and what it was held against; that is empty if it was nothing. FetchError, StateError."""
    digests, against = wanted.digests, "guest.toml" if wanted.digests else ""
    if not digests:
        try:
            digest, against = _published(wanted)
            digests = (digest,)
            note(f"guest.toml has no digest for {_which(wanted)}; its {digest.algorithm} is taken from {against}")
        except FetchError as error:
            if not allow_unverified:
                raise
            note(f"not verified: {error.message}")
    got = fetch(
        Want(urls=_urls(wanted, wanted.name), name=wanted.name, digests=digests, size=wanted.size),
        folder,
        progress=Meter(note, every_s=1 if progress.is_terminal() else 10),
        waiting=note,
        allow_unverified=allow_unverified,
    )
    return got, against


def sums(wanted: Release) -> tuple[str, str]:
    """The text of the list of sums that stands beside the file, and its address. FetchError when there is none."""
    if not wanted.sums:
        raise FetchError(f"guest.toml names no list of sums for {wanted.name}", hint="installer.sums in guest.toml")
    with tempfile.TemporaryDirectory() as place:
        want = Want(urls=_urls(wanted, wanted.sums), name=wanted.sums, compression="")
        got = fetch(want, Path(place), progress=_short, limits=SUMS_LIMITS, allow_unverified=True)
        return got.path.read_text(errors="replace"), got.url


def _published(wanted: Release) -> tuple[Digest, str]:
    """The strongest digest that the mirrors' list of sums has for the file, and the list's address."""
    missing = f"no digest is known for {wanted.name}: guest.toml has none for {_which(wanted)}"
    known = f" (digests are known for {', '.join(wanted.known)})" if wanted.known else ""
    check = f"check the version{known}; " if wanted.version else ""
    hint = f"{check}add a digest to installer.digests in guest.toml; or `doit fetch --allow-unverified`"
    if not wanted.sums:
        raise FetchError(missing, hint=hint)
    try:
        text, url = sums(wanted)
    except FetchError as error:
        raise FetchError(f"{missing}, and {error.message}", hint=hint) from error
    for algorithm in sorted(HEX_DIGITS, key=lambda name: -HEX_DIGITS[name]):
        listed = parse_sums(text, algorithm)
        if wanted.name in listed:
            return _digest(f"{algorithm}:{listed[wanted.name]} of download"), url
    raise FetchError(f"{missing}, and {url} does not list it", hint=hint)


def _which(wanted: Release) -> str:
    return f"version {wanted.version}" if wanted.version else "this guest, which has no version"


def _short(done: int, _: int | None) -> None:
    if done > SUMS_BYTES:
        raise FetchError(f"the list of sums has more than {megabytes(SUMS_BYTES)}", hint="use another mirror")


def _urls(wanted: Release, name: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for folder in wanted.folders)


def _folder(mirror: str, name: str) -> str:
    """A mirror's address as it is put before a name. The file's own address is accepted, and so is a relative path."""
    here = mirror if ":/" in mirror else str(Path(mirror).expanduser().absolute())
    return here.rstrip("/").removesuffix(f"/{name}")


def _digest(text: str) -> Digest:
    """`md5:HEX of download` as a Digest; the model has checked its form."""
    return msgspec.convert(
        dict(zip(("algorithm", "hex", "of"), text.replace(" of ", ":").split(":"), strict=True)), Digest
    )
