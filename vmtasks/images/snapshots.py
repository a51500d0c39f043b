"""Save a machine's disk as a named image."""

import hashlib
import time
from pathlib import Path

from vmtasks.images import prune
from vmtasks.images.workspace import MachineRecord, PhaseRecord, Workspace
from vmtasks.media import disk
from vmtasks.store.records import ImageRecord, write_record


def save(state: Workspace, overlay: Path, record: MachineRecord, name: str, key: Path | None = None) -> ImageRecord:
    """Flatten the disk of a stopped machine into the store, and name the image `name`.

    The image has no backing file, so that restoring, changing and saving again keeps both. Its digest is made up,
    because no record says what was done in the machine. `key` is the private key that the disk accepts, if it is not
    the store's: it is kept with the image, for the first login to machines made from it.
    """
    store, config = state.store, state.config
    digest = hashlib.sha256(f"{record.name} {name} {time.time_ns()}".encode()).hexdigest()
    with store.lock(f"image-{digest}", timeout_s=0):
        if key is not None:
            store.keep_key(digest, key)
        disk.flatten(overlay, store.partial(digest))
        virtual = int(disk.info(store.partial(digest))["virtual-size"])
        saved = store.publish(
            digest,
            lambda stat, sha256: ImageRecord(
                digest=digest,
                guest=config.guest.name,
                version=config.version,
                name=name,
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                sha256=sha256,
                virtual_size=virtual,
                ssh_user=record.ssh_user,
                host_keys=record.host_keys,
                created=round(time.time(), 3),
            ),
        )
        with prune.naming(store, config.vm_dir):
            write_record(state.snapshot_record(name), PhaseRecord(digest=digest, sha256=saved.sha256))
    return saved
