"""Private places, which never go into a guest: state folders, stores and machines' folders, with the keys in them.

They are recognised by device and inode, whatever links and mounts lead there, and by their contents: also those of
other projects and users, and copies.
"""

import os
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

from vmtasks.config.load import CONFIG_PATH, Config, default_state, default_store
from vmtasks.images import prune
from vmtasks.store.store import Store

CONFIG_FOLDER = os.fsencode(CONFIG_PATH.parent)
STATE = b".vm"
"""A project's state folder, unless VM_DIR names another."""


class Private:
    """The private places of this host that a project knows."""

    def __init__(self, config: Config) -> None:
        """Reads nothing yet."""
        self.config = config

    @cached_property
    def places(self) -> frozenset[tuple[int, int]]:
        """Device and inode of the known folders and keys."""
        found = set()
        for path in self._paths():
            try:
                info = path.stat()
            except OSError:
                continue
            found.add((info.st_dev, info.st_ino))
        return frozenset(found)

    def around(self, folder: Path) -> Path | None:
        """The private place that `folder` is or lies in; None for any other folder."""
        real = folder.resolve()
        for place in (real, *real.parents):
            try:
                info, names = place.stat(), {os.fsencode(path.name) for path in place.iterdir()}
            except OSError:
                continue
            if (info.st_dev, info.st_ino) in self.places or self.looks_private(os.fsencode(place), names):
                return place
        return None

    def private_names(self, folder: bytes, names: Collection[bytes]) -> Collection[bytes]:
        """The name of a project's state folder in `folder`, also if it does not exist yet."""
        is_project = CONFIG_FOLDER in names and Path(os.fsdecode(folder), CONFIG_PATH).is_file()
        return (STATE,) if is_project else ()

    def looks_private(self, folder: bytes, names: Collection[bytes]) -> bool:
        """Whether a folder that contains `names` looks like a private place."""
        if os.path.basename(folder) == STATE and b"run" in names:  # noqa: PTH119 - bytes
            return any(Path(os.fsdecode(folder), "run").glob("*/id_ed25519"))
        if b"machine.toml" in names:
            return b"disk.qcow2" in names or b"id_ed25519" in names
        if b"keys" in names and (b"images" in names or b"locks" in names):
            return Path(os.fsdecode(folder), "keys", "id_ed25519").is_file()
        if b"run" in names and (b"doit.sqlite3" in names or b"access.log" in names):
            return any(Path(os.fsdecode(folder), "run").glob("*/machine.toml"))
        return False

    def _paths(self) -> Iterator[Path]:
        """The known state folders, the stores, and the keys in our own."""
        own, stores = self.config.vm_dir, {self.config.store_dir, default_store(os.environ)}
        yield own
        yield from own.glob("run/*/id_ed25519")
        yield default_state(os.environ)
        for store in stores:
            yield store
            for folder, _, names in os.walk(store / "keys"):
                yield Path(folder)
                yield from (Path(folder, name) for name in names if not name.endswith(".pub"))
            yield from prune.state_folders(Store(store))
