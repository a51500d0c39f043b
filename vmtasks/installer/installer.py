"""Have a guest's installer ISO in the store, whichever way guest.toml says it comes about."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmtasks.config.load import Config
from vmtasks.config.recipe import Recipe
from vmtasks.config.tables import Download
from vmtasks.host import files
from vmtasks.media import tree
from vmtasks.store.store import MediaRecord, Store

if TYPE_CHECKING:
    from vmtasks.installer.download.release import Release

FORMAT = 1
"""Raised when the composer's output changes for the same recipe."""


def recipe_digest(config: Config) -> str:
    """Digest of all that decides the installer: the [installer] table, its overlay files, the phases' packages.

    Asked at every run of doit, so that nothing is imported for it but what reads the overlay.
    """
    guest = config.guest
    if isinstance(guest.installer, Download):
        from vmtasks.installer.download import release  # noqa: PLC0415 - 4 ms

        wanted = release.release(guest.installer, config.version)
        return hashlib.sha256(msgspec.json.encode([FORMAT, "download", *wanted.identity])).hexdigest()
    digest = hashlib.sha256(msgspec.json.encode([FORMAT, guest.installer, config.version], order="sorted"))
    digest.update(msgspec.json.encode([[phase.name, phase.packages] for phase in guest.phases]))
    for folder in (guest.installer.files, guest.installer.initramfs.files):
        for entry in tree.overlay(config.guest_dir / folder) if folder else ():
            digest.update(f"{entry.path} {entry.kind} {entry.mode:o} {entry.target}\n".encode())
            digest.update(hashlib.sha256(entry.read()).digest())
    return digest.hexdigest()


def make(
    config: Config, store: Store, recipe: str, note: Callable[[str], None], *, allow_unverified: bool = False
) -> MediaRecord:
    """Compose or download the installer, and have the packages that phases carry. FetchError, ImageError."""
    made = config.guest.installer
    if isinstance(made, Recipe):
        return _compose(config, made, store, recipe, note)
    from vmtasks.installer.download import release  # noqa: PLC0415 - as above

    return _download(release.release(made, config.version), store, recipe, note, allow_unverified=allow_unverified)


def _download(
    wanted: "Release", store: Store, recipe: str, note: Callable[[str], None], *, allow_unverified: bool
) -> MediaRecord:
    from vmtasks.installer.download import release  # noqa: PLC0415 - as above

    note(wanted.name)
    got, against = release.obtain(wanted, store.root / "downloads", note, allow_unverified=allow_unverified)
    return MediaRecord(
        sha256=got.sha256,
        size=got.size,
        mtime_ns=got.path.stat().st_mtime_ns,
        origin=got.url or "the store",
        recipe=recipe,
        verified=against,
    )


def _compose(config: Config, made: Recipe, store: Store, recipe: str, note: Callable[[str], None]) -> MediaRecord:
    from vmtasks.installer.compose import compose, debian  # noqa: PLC0415 - 50 ms

    cache = store.root / "packages"
    note("compose it from Debian packages")
    with files.temporary(store.download(recipe), folder=True) as place:
        composed = compose.compose(made, config.guest_dir, cache, place / "iso")
        path = store.download(composed.sha256)
        if not path.exists() or debian.digest(path) != composed.sha256:  # it may come from another recipe
            files.publish(place / "iso", path, 0o444)
    local = {
        phase.name: [
            _keep(store, deb, debian.digest(deb)) for deb in compose.local_packages(made, phase.packages, cache)
        ]
        for phase in config.guest.phases
        if phase.packages
    }
    return MediaRecord(
        sha256=composed.sha256,
        size=composed.size,
        mtime_ns=path.stat().st_mtime_ns,
        origin="packages",
        recipe=recipe,
        packages=[f"{p.name} {p.version} {p.sha256}" for p in composed.packages],
        local_packages=local,
        verified="the archive's signed lists",
    )


def _keep(store: Store, deb: Path, sha256: str) -> str:
    """Have a package among the store's downloads; gives its digest and file name."""
    path = store.download(sha256)
    if not path.exists():
        path.hardlink_to(deb)
    return f"{sha256} {deb.name}"
