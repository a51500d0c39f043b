"""Remove from a store what no project's record names. Each project tells the store where its records are."""

import hashlib
from contextlib import suppress
from pathlib import Path

from vmtasks import atomic, leftovers
from vmtasks.errors import StateError
from vmtasks.state import MachineRecord, PhaseRecord
from vmtasks.store import MediaRecord, Store, read_record


def register(store: Store, vm_dir: Path) -> None:
    """Tell the store that the records below `vm_dir` speak of it."""
    name = hashlib.sha256(bytes(vm_dir.absolute())).hexdigest()[:16]
    atomic.write_if_changed(store.root / "projects" / name, f"{vm_dir.absolute()}\n")


def prune(store: Store) -> tuple[list[Path], int]:
    """Remove images and installers that no registered project names; returns what is gone, and its bytes.

    So do leftovers of processes that were killed. What somebody is making at this moment is left alone. A project whose
    folder is gone names nothing.
    """
    images: set[str] = set()
    installers: set[str] = set()
    for entry in sorted((store.root / "projects").glob("*")):
        vm_dir = Path(entry.read_text().strip())
        if not vm_dir.is_dir():
            entry.unlink()
            continue
        images |= named_images(vm_dir)
        installers |= named_installers(vm_dir)
    for key in (store.root / "keys" / "snapshots").glob("*"):
        if key.name not in images:
            with suppress(StateError), store.lock(f"image-{key.name}", timeout_s=0):
                key.unlink(missing_ok=True)
    sizes = {path: path.stat().st_size for folder in ("images", "failed") for path in (store.root / folder).glob("*")}
    gone = store.prune(images)
    size = sum(sizes.get(path, 0) for path in gone)
    for path in sorted((store.root / "media").glob("*.toml")):
        media = read_record(path, MediaRecord)
        if media is not None and media.sha256 in installers:
            continue
        path.unlink(missing_ok=True)
        iso = store.download(media.sha256) if media else None
        if media is not None and iso is not None and iso.exists():
            iso.unlink()
            gone.append(iso)
            size += media.size
    for path, bytes_ in leftovers.sweep(store.root):
        gone.append(path)
        size += bytes_
    return gone, size


def named_images(vm_dir: Path) -> set[str]:
    """Digests of the images that a project's phases, snapshots and machines stand on."""
    paths = [*vm_dir.glob("*/phase-*.toml"), *vm_dir.glob("*/clean.toml"), *vm_dir.glob("*/snapshots/*.toml")]
    named = {record.digest for record in (read_record(path, PhaseRecord) for path in paths) if record is not None}
    machines = (read_record(path, MachineRecord) for path in vm_dir.glob("run/*/machine.toml"))
    return named | {record.image for record in machines if record is not None}


def named_installers(vm_dir: Path) -> set[str]:
    """Digests of the installers that a project's guests are made from."""
    records = (read_record(path, MediaRecord) for path in vm_dir.glob("*/installer.toml"))
    return {record.sha256 for record in records if record is not None}
