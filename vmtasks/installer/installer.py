"""Put a guest's installer ISO into the store: downloaded or composed, as guest.toml says."""

import hashlib
import os
from pathlib import Path

import msgspec

from vmtasks.config.load import Config
from vmtasks.config.recipe import Recipe
from vmtasks.config.tables import Download
from vmtasks.host import files
from vmtasks.host.progress import Say
from vmtasks.installer.download.want import release
from vmtasks.media import tree
from vmtasks.store.records import MediaRecord
from vmtasks.store.store import Store

FORMAT = 1
"""Increase it when the composer's output changes for the same recipe."""


def recipe(config: Config) -> tuple[str, dict[str, str]]:
    """Digest of what the installer is made from, and its parts as a user edits them.

    These are the [installer] table, its overlay files and the phases' packages. OSError, ImageError for an odd overlay.
    Every run of doit asks for it.
    """
    guest = config.guest
    if isinstance(guest.installer, Download):
        wanted = release(guest.installer, config.version, os.environ)
        digest = hashlib.sha256(msgspec.json.encode([FORMAT, "download", *wanted.identity]))
        names = ("installer.file", "installer.digests" if wanted.digests else "installer.sums", "installer.mirrors")
        return digest.hexdigest(), {name: _part(value) for name, value in zip(names, wanted.identity, strict=False)}
    table = {f"installer.{name}": _part(value) for name, value in msgspec.structs.asdict(guest.installer).items()}
    parts = {**table, "version": config.version, "vmtasks: composer": str(FORMAT)}
    digest = hashlib.sha256(msgspec.json.encode([FORMAT, guest.installer, config.version], order="sorted"))
    digest.update(msgspec.json.encode([[phase.name, phase.packages] for phase in guest.phases]))
    parts |= {f"packages of {phase.name}": _part(phase.packages) for phase in guest.phases}
    for folder in (guest.installer.files, guest.installer.initramfs.files):
        for entry in tree.overlay(config.guest_dir / folder) if folder else ():
            told = f"{entry.path} {entry.kind} {entry.mode:o} {entry.target}\n".encode()
            content = hashlib.sha256(entry.read()).digest()
            digest.update(told)
            digest.update(content)
            parts[f"{folder}/{entry.path}"] = hashlib.sha256(told + content).hexdigest()
    return digest.hexdigest(), parts


def _part(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def make(config: Config, store: Store, recipe: str, note: Say, *, allow_unverified: bool = False) -> MediaRecord:
    """Compose or download the installer, and the packages that phases carry. FetchError, ImageError."""
    made = config.guest.installer
    if isinstance(made, Recipe):
        return _compose(config, made, store, recipe, note)
    return _download(made, config.version, store, recipe, note, allow_unverified=allow_unverified)


def _download(
    made: Download, version: str, store: Store, recipe: str, note: Say, *, allow_unverified: bool
) -> MediaRecord:
    from vmtasks.installer.download.fetch import obtain  # noqa: PLC0415 - httpx: 200 ms, where recipe() suffices

    wanted = release(made, version, os.environ)
    note(wanted.name)
    got, against = obtain(wanted, store.root / "downloads", note, allow_unverified=allow_unverified)
    return MediaRecord(
        sha256=got.sha256,
        size=got.size,
        mtime_ns=got.path.stat().st_mtime_ns,
        origin=got.url or "the store",
        recipe=recipe,
        verified=against,
    )


def _compose(config: Config, made: Recipe, store: Store, recipe: str, note: Say) -> MediaRecord:
    from vmtasks.installer.compose import compose  # noqa: PLC0415 - 50 ms

    cache = store.root / "packages"
    note("compose it from Debian packages")
    with files.temporary(store.download(recipe), folder=True) as place:
        composed = compose.compose(made, config.guest_dir, cache, place / "iso")
        path = store.download(composed.sha256)
        if not path.exists() or files.sha256(path) != composed.sha256:  # it may come from another recipe
            files.publish(place / "iso", path, 0o444)
    local = {
        phase.name: [
            _keep(store, deb, files.sha256(deb)) for deb in compose.local_packages(made, phase.packages, cache)
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
    """Link a package into the store's downloads; returns its digest and file name."""
    path = store.download(sha256)
    if not path.exists():
        path.hardlink_to(deb)
    return f"{sha256} {deb.name}"
