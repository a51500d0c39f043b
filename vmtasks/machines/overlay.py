"""A machine's disk, an overlay on the image of a snapshot: create it, check its image, save it as a snapshot."""

import os
import time
from pathlib import Path

import msgspec

from vmtasks.errors import StateError
from vmtasks.images import prune, snapshots
from vmtasks.images.workspace import CLEAN, MachineRecord, PhaseRecord
from vmtasks.machines import identity, start
from vmtasks.machines.folder import Place
from vmtasks.media import disk
from vmtasks.store import qcow2
from vmtasks.store.records import ImageRecord, read_record

KEPT_FIELDS = (
    "own", "throwaway", "owner", "owner_started", "lease_until", "login", "authorized", "disk_size", "want_port",
    "binds", "memory", "cpus", "network", "created",
)  # fmt: skip
"""The requested properties of a machine of `vmtasks run`, kept on a fresh disk."""


def names(place: Place) -> list[str]:
    """The snapshots of the guest, `clean` first."""
    own = sorted(path.stem for path in (place.config.guest_state / "snapshots").glob("*.toml"))
    return ([CLEAN] if place.state.snapshot_record(CLEAN).is_file() else []) + own


def find_image(place: Place, snapshot: str) -> ImageRecord:
    """The image of a snapshot. StateError if it does not exist or cannot be used."""
    path = place.state.snapshot_record(snapshot)
    named = read_record(path, PhaseRecord)
    if named is None:
        there = ", ".join(names(place)) or "none"
        what = f"there is no snapshot {snapshot!r} of {place.config.guest.name}; there is: {there}"
        raise StateError(what, hint=_image_hint(place, snapshot))
    image, fault = place.state.store.find(named.digest, named.sha256, look="sample")
    if image is None:
        raise StateError(f"snapshot {snapshot!r} cannot be used: {fault}", hint=_image_hint(place, snapshot))
    return image


def make(place: Place, snapshot: str, like: MachineRecord | None = None) -> MachineRecord:
    """Create a fresh overlay and record: a stopped machine that was never started. Keeps the properties of `like`.

    The record is written before the overlay, which appears atomically: a machine without one gets it when it starts.
    """
    with prune.naming(place.state.store, place.config.vm_dir):
        image, beside = find_image(place, snapshot), place.disk.with_suffix(".new")
        place.make_folder()
        for old in (place.disk, beside, place.folder / "ready", place.crashed, place.key_cd):
            old.unlink(missing_ok=True)
        record = place.write(_first_record(place, snapshot, image, like))
        size = max(image.virtual_size, place.config.disk_size)
        with place.state.store.explaining(image, _image_hint(place, snapshot)):
            disk.overlay(beside, place.state.store.image(image), size=size)
        beside.rename(place.disk)
    return record


def save(place: Place, record: MachineRecord, name: str) -> ImageRecord:
    """Save the disk of a stopped machine as a standalone snapshot."""
    image = require_image(place, record)
    with place.state.store.explaining(image, _remedy(place)):
        return snapshots.save(place.state, place.disk, record, name, _key_inside(place, record))


def require_image(place: Place, record: MachineRecord) -> ImageRecord | None:
    """The backing image of the machine's disk; None if it was installed by hand.

    StateError unless the image is unchanged. If the store was moved, updates the backing file's path.
    """
    if not record.image:
        return None
    if not os.access(place.disk, os.R_OK | os.W_OK):
        raise StateError(
            f"machine {place.name} cannot use its disk {place.disk}: another user owns it, or its mode forbids it",
            hint=f"check ls -l {place.disk}: you must own it, with mode 0600",
        )
    store, header = place.state.store, qcow2.header(place.disk)
    image, fault = store.find(record.image, record.image_sha256, look="sample")
    at = Path(header.backing) if header else None
    if at is None:
        fault = f"{place.disk.name} is no qcow2 image"
    elif image is not None and at.name != store.image(image).name:
        fault = f"{place.disk.name} is backed by {at.name}"
    if image is None or at is None or fault:
        raise StateError(
            f"machine {place.name} was made on image {record.image[:12]}, which cannot be used: {fault}",
            hint=_remedy(place),
        )
    if at != store.image(image).absolute():
        disk.reback(place.disk, store.image(image))
    return image


def _first_record(place: Place, snapshot: str, image: ImageRecord, like: MachineRecord | None) -> MachineRecord:
    fresh = MachineRecord(
        name=place.name,
        guest=place.config.label,
        snapshot=snapshot,
        image=image.digest,
        image_sha256=image.sha256,
        ssh_user=image.ssh_user,
        host_keys=image.host_keys,
        mac=identity.mac(place.folder),
        family=place.config.guest.name,
        version=place.config.version,
        created=round(time.time(), 1),
    )
    if like is None or not like.own:
        return fresh
    same = {name: getattr(like, name) for name in KEPT_FIELDS}
    return msgspec.structs.replace(fresh, **same, want_forwards=[*map(str, start.requested_forwards(like))])


def _image_hint(place: Place, snapshot: str) -> str:
    """The hint for a missing image. Only `clean` is made by a task."""
    return "doit auto_install" if snapshot == CLEAN else f"vmtasks snapshots {place.config.guest.name}"


def _remedy(place: Place) -> str:
    """The hint for a missing or damaged backing image."""
    record = place.record()
    restore = f"vmtasks restore {place.name}" if record is not None and record.own else "doit restore"
    return (
        f"put the file back from a copy of the store, then vmtasks doctor --store; "
        f"or {restore}, which discards the machine's writes"
    )


def _key_inside(place: Place, record: MachineRecord) -> Path | None:
    """The private key that the machine's disk authorizes, if it is not the store's."""
    key = place.own_key if record.key == "own" else place.bootstrap_key(record)
    return None if key == place.state.key else key
