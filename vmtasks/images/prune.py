"""Remove what no project's record names from a store. Each project registers its records with the store.

`projects/<id>.toml` lists what a state folder named when one of its records was last written: that list counts if the
folder is missing or a record is unreadable.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vmtasks.errors import ConfigError, StateError
from vmtasks.host import files
from vmtasks.host.progress import say
from vmtasks.images.workspace import MachineRecord, PhaseRecord
from vmtasks.store import leftovers, qcow2
from vmtasks.store.records import MediaRecord, R, read_record, write_record
from vmtasks.store.store import Store

NAMES_S = 600.0
NOTHING_GOES = "so that no image and no installer is removed, as it may name any"
NOT_GUESTS = ("results", "run")
"""Folders beside those of the guests."""


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """What a state folder names: images as `digest sha256`, backing files of overlays, installers.

    `complete`: all its records were readable at least once.
    """

    vm_dir: str
    images: list[str] = []
    disks: list[str] = []
    installers: list[str] = []
    complete: bool = True


class Pruned(msgspec.Struct, kw_only=True):
    """What was, or would be, removed; its size in bytes; and warnings about records that could not be read."""

    gone: list[Path]
    size: int
    warnings: list[str]


@contextlib.contextmanager
def naming(store: Store, vm_dir: Path) -> Iterator[None]:
    """Hold off pruning while the block looks up what the store has and writes records below `vm_dir` that name it.

    Afterwards the store knows the names. OSError for a store that cannot be written.
    """
    files.private_folder(vm_dir)
    with _lock(store):
        yield
        _remember(store, vm_dir)


def register(store: Store, vm_dir: Path) -> None:
    """Tell the store what the records below `vm_dir` name."""
    with naming(store, vm_dir):
        pass


def prune(store: Store, *, dry_run: bool = False, forget: Path | None = None) -> Pruned:
    """Remove images and installers that no project names, and leftovers of killed processes.

    Files that a process is making now are kept. A missing state folder keeps what it last named, until `forget` names
    that folder or its project's. ConfigError for a `forget` that the store does not know, or that exists. `dry_run`
    removes nothing.
    """
    with _lock(store):
        if forget is not None:
            _forget(store, forget, dry_run=dry_run)
        names, warnings, complete = _all_names(store, None if not dry_run else forget)
        images = {(digest, sha256) for each in names for digest, _, sha256 in (i.partition(" ") for i in each.images)}
        needed = store.reachable(images, {disk for each in names for disk in each.disks})
        sizes = {
            path: path.lstat().st_size for place in ("images", "failed") for path in (store.root / place).glob("*")
        }
        gone = store.prune(needed if complete else None, dry_run=dry_run)
        size = sum(sizes.get(path, 0) for path in gone)
        if complete:
            _prune_keys(store, {stem.partition(".")[0] for stem in needed}, dry_run=dry_run)
            installers = {sha256 for each in names for sha256 in each.installers}
            for path, bytes_ in _prune_media(store, installers, warnings, dry_run=dry_run):
                gone.append(path)
                size += bytes_
    for path, bytes_ in leftovers.sweep(store.root, dry_run=dry_run):
        gone.append(path)
        size += bytes_
    return Pruned(gone=gone, size=size, warnings=warnings)


def drop(store: Store, digest: str, sha256: str) -> bool:
    """Remove an image and its key, unless a project names it or may name it. True if it was removed."""
    with _lock(store):
        names, _, complete = _all_names(store, None)
        images = {(named, of) for each in names for named, _, of in (item.partition(" ") for item in each.images)}
        record = store.record(digest, sha256)
        disks = {disk for each in names for disk in each.disks}
        if record is None or not complete or record.stem in store.reachable(images, disks):
            return False
        with store.lock(f"image-{digest}", timeout_s=0):
            store.drop(record)
            if not store.made(digest):
                store.drop_key(digest)
    return True


def names_of(vm_dir: Path) -> tuple[Names, list[Path]]:
    """What the records and overlays below a state folder name, and the unreadable ones."""
    unread: list[Path] = []
    guests = [path for path in _listed(vm_dir, "*", unread) if path.name not in NOT_GUESTS and path.is_dir()]
    machines = [path for path in _listed(vm_dir / "run", "*", unread) if path.is_dir()]
    phases = [
        path
        for guest in guests
        for pattern in ("phase-*.toml", "clean.toml")
        for path in _listed(guest, pattern, unread)
    ]
    snapshots = [path for guest in guests for path in _listed(guest / "snapshots", "[!.]*.toml", unread)]
    overlays = [path for guest in guests for path in _listed(guest, "look-*.qcow2", unread)]
    overlays += [path for machine in machines for path in _listed(machine, "disk.qcow2", unread)]
    images = {f"{r.digest} {r.sha256}" for r in _read([*phases, *snapshots], PhaseRecord, unread)}
    of_machines = _read([machine / "machine.toml" for machine in machines], MachineRecord, unread)
    images |= {f"{r.image} {r.image_sha256}" for r in of_machines if r.image}
    disks = {Path(told.backing).stem for told in map(qcow2.header, overlays) if told and told.backing}
    media = _read([path for guest in guests for path in _listed(guest, "installer.toml", unread)], MediaRecord, unread)
    named = Names(
        vm_dir=str(vm_dir.absolute()),
        images=sorted(images),
        disks=sorted(disks),
        installers=sorted({record.sha256 for record in media}),
    )
    return named, unread


# -- parts


def _lock(store: Store) -> contextlib.AbstractContextManager[int]:
    waiting = "the names of what the store holds: {} is at work on them; waiting"
    return store.lock("names", timeout_s=NAMES_S, waiting=lambda holder: say(waiting.format(holder)))


def _entry(store: Store, vm_dir: Path) -> Path:
    name = hashlib.sha256(bytes(vm_dir.absolute())).hexdigest()[:16]
    return store.root / "projects" / f"{name}.toml"


def _remember(store: Store, vm_dir: Path) -> None:
    """Write down what a state folder names; for unreadable records, what they named before."""
    entry = _entry(store, vm_dir)
    named, unread = names_of(vm_dir)
    before = read_record(entry, Names)
    if unread:
        named = _joined(named, before) if before else msgspec.structs.replace(named, complete=False)
    if named != before:
        write_record(entry, named)
    entry.with_suffix("").unlink(missing_ok=True)  # as older versions wrote it


def _joined(one: Names, other: Names) -> Names:
    return Names(
        vm_dir=one.vm_dir,
        images=sorted({*one.images, *other.images}),
        disks=sorted({*one.disks, *other.disks}),
        installers=sorted({*one.installers, *other.installers}),
        complete=other.complete,
    )


def _all_names(store: Store, forgotten: Path | None) -> tuple[list[Names], list[str], bool]:
    """What all registered state folders name, warnings, and whether the list is complete: if not, remove nothing."""
    found, warnings, complete = [], [], True
    for entry in sorted((store.root / "projects").glob("[!.]*")):
        remembered = read_record(entry, Names)
        if remembered is None and entry.suffix:
            warnings.append(f"{entry} cannot be read; {NOTHING_GOES}. Remove it, and run doit in that project")
            complete = False
            continue
        vm_dir = _folder(entry, remembered)
        if forgotten is not None and forgotten.absolute() in (vm_dir, vm_dir.parent):
            continue
        named, unread = names_of(vm_dir)
        away = _is_away(vm_dir)
        if away and remembered == Names(vm_dir=str(vm_dir)):  # it named nothing
            entry.unlink(missing_ok=True)
            continue
        if away:
            unread = [vm_dir]
        found.append(named if remembered is None or not unread else _joined(named, remembered))
        known = remembered is not None and remembered.complete
        kept = "what it named last is kept" if known else NOTHING_GOES
        complete = complete and (known or not unread)
        if away:
            warnings.append(f"{vm_dir} is not there; {kept}. If it is gone for good: vmtasks prune --forget {vm_dir}")
        else:
            warnings += [f"{path} cannot be read; {kept}. Repair or remove it" for path in unread]
    return found, warnings, complete


def _is_away(vm_dir: Path) -> bool:
    """Whether a state folder is missing, or empty like an unused mount point. An unreadable one is not away."""
    try:
        return not any(vm_dir.iterdir())
    except PermissionError:
        return False
    except OSError:
        return True


def _folder(entry: Path, remembered: Names | None) -> Path:
    """The state folder of an entry; older versions wrote only its path."""
    return Path(remembered.vm_dir if remembered else files.read_text(entry, "replace").strip())


def state_folders(store: Store) -> Iterator[Path]:
    """The state folders that the store knows, existing or not, without those of unreadable entries."""
    for entry in (store.root / "projects").glob("[!.]*"):
        with contextlib.suppress(OSError, ValueError):
            yield _folder(entry, read_record(entry, Names))


def _forget(store: Store, folder: Path, *, dry_run: bool) -> None:
    """Unregister a state folder that no longer exists. ConfigError for an unknown or existing one."""
    entries = sorted((store.root / "projects").glob("[!.]*"))
    known = {entry: _folder(entry, read_record(entry, Names)) for entry in entries}
    wanted = folder.absolute()
    found = [entry for entry, vm_dir in known.items() if wanted in (vm_dir, vm_dir.parent)]
    if not found:
        there = ", ".join(sorted(str(vm_dir) for vm_dir in known.values() if not vm_dir.is_dir())) or "none"
        raise ConfigError(f"--forget {folder}: the store knows no such state folder; those that are not there: {there}")
    for entry in found:
        if known[entry].is_dir() and any(known[entry].iterdir()):
            raise ConfigError(f"--forget {folder}: {known[entry]} is there, and what it names is kept; remove it first")
        if not dry_run:
            entry.unlink()


def _prune_keys(store: Store, digests: set[str], *, dry_run: bool) -> None:
    for key in (store.root / "keys" / "snapshots").glob("*"):
        digest = key.name.removesuffix(".pub")
        if digest not in digests and not dry_run:
            with contextlib.suppress(StateError), store.lock(f"image-{digest}", timeout_s=0):
                store.drop_key(digest)


def _prune_media(
    store: Store, installers: set[str], warnings: list[str], *, dry_run: bool
) -> Iterator[tuple[Path, int]]:
    """Remove installers that no project names; yields each with its size. A running fetch holds its recipe's lock."""
    for path in sorted((store.root / "media").glob("[!.]*.toml")):
        media = read_record(path, MediaRecord)
        if media is None:
            warnings.append(f"{path} cannot be read; the installer that it may name is kept. Repair or remove it")
            continue
        if media.sha256 in installers:
            continue
        with contextlib.suppress(StateError), store.lock(f"media-{path.stem[:32]}", timeout_s=0):
            iso = store.download(media.sha256)
            if iso.exists():
                yield iso, media.size
            if not dry_run:
                path.unlink(missing_ok=True)
                iso.unlink(missing_ok=True)


def _listed(folder: Path, pattern: str, unread: list[Path]) -> list[Path]:
    """The matching contents of a folder; [] for a missing one. An unreadable folder is added to `unread`."""
    try:
        return sorted(path for path in folder.iterdir() if path.match(pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        unread.append(folder)
        return []


def _read(paths: list[Path], kind: type[R], unread: list[Path]) -> list[R]:
    found = []
    for path in paths:
        record = read_record(path, kind)
        if record is not None:
            found.append(record)
        elif os.path.lexists(path):
            unread.append(path)
    return found
