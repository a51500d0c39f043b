"""The machines of one project, or without a project: list, create, find and reap them."""

import errno
import functools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from vmtasks.config import arguments, load, rules
from vmtasks.config.load import CONFIG_PATH, Config, show_size
from vmtasks.config.mistakes import nearest
from vmtasks.errors import BusyError, ConfigError, StateError
from vmtasks.host import files, processes
from vmtasks.images import prune
from vmtasks.images.private import Private
from vmtasks.images.workspace import CLEAN, MachineRecord, PhaseRecord, Workspace
from vmtasks.machines import binds, identity, overlay, reap, spec
from vmtasks.machines.folder import Place
from vmtasks.machines.machine import Machine
from vmtasks.machines.spec import MachineSpec
from vmtasks.store.records import read_record, write_record


class Project:
    """The machines of a project, and the images they are made from."""

    def __init__(
        self, root: Path | None, environ: Mapping[str, str] = os.environ, variables: Mapping[str, str] | None = None
    ) -> None:
        """`root` holds config/vm.toml; None: no project, only the guests that ship with vmtasks.

        `variables` are those of doit's command line.
        """
        self.root = root
        self.environ = environ
        self.variables = variables or {}

    @classmethod
    def find(cls, start: Path, environ: Mapping[str, str] = os.environ) -> "Project":
        """The project that contains `start`, or none. VM_CONFIG selects another configuration file."""
        if environ.get("VM_CONFIG"):
            return cls(start, environ)
        found = (folder for folder in (start, *start.parents) if (folder / CONFIG_PATH).is_file())
        return cls(next(found, None), environ)

    @classmethod
    def here(cls) -> "Project":
        """The project that contains the current folder, or none: then only the guests that ship with vmtasks."""
        return cls.find(Path.cwd())

    def config(self, guest: str = "", version: str = "") -> Config:
        """The configuration, by default for the configured guest. ConfigError for an invalid one."""
        given = {name: value for name, value in self.variables.items() if not (guest and name in ("guest", "version"))}
        given |= {name: value for name, value in (("guest", guest), ("version", version)) if value}
        if self.root is None:
            return load.without_project(given, self.environ)
        made = load.load(self.root, given, self.environ)
        rules.check(made)
        return made

    # -- queries

    def names(self) -> list[str]:
        """The names of all machines, sorted, including those with an unreadable record."""
        return Workspace(self.config()).machine_names()

    def own_machines(self) -> list[Machine]:
        """The machines that `vmtasks run` has made. Skips machines with an unreadable record."""
        return [one for one in self.machines() if (record := one.place.state.machine(one.name)) and record.own]

    def guests(self) -> list[str]:
        """The names of this project's guests, or of those that ship with vmtasks, sorted."""
        phases = (self.root or load.shipped()) / load.PHASES_PATH
        return sorted(path.parent.name for path in phases.glob("*/guest.toml"))

    def snapshots(self, guest: str = "") -> list[str]:
        """The snapshots of a guest, by default the configured one."""
        return overlay.names(Place(self.config(guest)))

    def machine(self, name: str = "") -> Machine:
        """The machine of this name, by default the configured one. StateError if it does not exist."""
        there = self.names()
        if not name:
            name = self.config().name
        if name not in there:
            known = f"; there is: {', '.join(there)}" if there else "; there is none"
            close = nearest(name, there)
            hint = f"did you mean {close}?" if close else "vmtasks run -d --name NAME, or doit start, makes one"
            raise StateError(f"there is no machine {name!r}{known}", hint=hint)
        return self._open(name)

    def default(self) -> Machine:
        """The configured machine, whether or not it exists."""
        base = self.config()
        machine = Machine(base)
        if self.root is None and machine.place.record() is None:
            require_shipped_image(base)
        return machine

    def machines(self) -> Iterator[Machine]:
        """All machines whose guest has a configuration here."""
        config = functools.cache(self.config)  # many machines, few guests
        for name in Workspace(config()).machine_names():
            with suppress(ConfigError, StateError):
                yield self._open(name, config)

    # -- creating

    def create(self, asked: MachineSpec, *, owner: int = 0) -> Machine:
        """Create a stopped machine with its record. It expires with the process `owner`, if given.

        ConfigError for invalid properties, StateError for a taken name. Nothing is left behind then.
        """
        guest, snapshot = arguments.image(asked.image)
        arguments.apart(asked.binds)
        arguments.distinct(asked.ssh_port, asked.forwards)
        base = self.config(guest)
        private = Private(base)
        bound = [binds.check(bind, private) for bind in asked.binds]
        spec.check(base, asked)
        snapshot = snapshot or CLEAN
        if self.root is None and snapshot == CLEAN:
            require_shipped_image(base)
        with prune.naming(Workspace(base).store, base.vm_dir):
            record = msgspec.structs.replace(self._first_record(base, asked, snapshot, owner), binds=bound)
            return Machine(spec.config_for(base, record), self._claim(asked.name, base, record))

    def _first_record(self, base: Config, asked: MachineSpec, snapshot: str, owner: int) -> MachineRecord:
        """The record of the requested machine, without a name yet."""
        image = overlay.find_image(Place(base), snapshot)
        size = asked.disk_size or max(base.disk_size, image.virtual_size)
        if size < image.virtual_size:
            raise ConfigError(
                f"--disk {show_size(size)}: less than the image's {show_size(image.virtual_size)}; use that or more"
            )
        return MachineRecord(
            name="",
            guest=base.label,
            snapshot=snapshot,
            image=image.digest,
            image_sha256=image.sha256,
            ssh_user=image.ssh_user,
            host_keys=image.host_keys,
            memory=asked.memory or base.memory,
            cpus=asked.cpus or base.cpus,
            network=asked.network or base.network,
            family=base.guest.name,
            version=base.version,
            own=True,
            throwaway=asked.throwaway,
            owner=owner,
            owner_started=processes.started(owner) if owner else "",
            lease_until=round(time.time() + asked.lease_s, 1) if asked.lease_s else 0.0,
            authorized=[str(key) for key in asked.authorized],
            login=asked.user,
            disk_size=size,
            want_port=asked.ssh_port,
            want_forwards=[str(forward) for forward in asked.forwards],
            created=round(time.time(), 1),
        )

    def _claim(self, name: str, base: Config, record: MachineRecord) -> str:
        """Claim a name by renaming a folder that already holds the record: no machine exists without one."""
        run = self._run()
        files.private_folder(run.parent)
        run.mkdir(exist_ok=True)
        staged = run / f"{reap.STAGED}{os.getpid()}-{secrets.token_hex(4)}"
        staged.mkdir(mode=0o700)
        try:
            number = 0
            while True:
                number += 1
                chosen = name or f"{base.guest.name}-{number}"
                named = msgspec.structs.replace(record, name=chosen, mac=identity.mac(run / chosen))
                write_record(staged / "machine.toml", named)
                if self._take_name(staged, Place(base, chosen)):
                    return chosen
                if name:
                    raise StateError(
                        f"there is a machine {name!r} already", hint=f"vmtasks rm {name}, or choose another --name"
                    )
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _take_name(self, staged: Path, place: Place) -> bool:
        """Rename the staged folder to the machine's; False if the name is taken or its lock is held."""
        try:
            with place.lock(0, say=False):
                staged.rename(place.folder)  # fails on a folder that is not empty
        except BusyError:
            return False
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        return True

    def remove_snapshot(self, image: str) -> bool:
        """Remove `GUEST:SNAPSHOT`, and its image unless a record of any project may name it; False if one may.

        StateError if there is no such snapshot, or a machine uses it.
        """
        guest, tag = arguments.image(image)
        state = Workspace(self.config(guest))
        if not tag or state.snapshot_record(tag) == state.clean_record:
            raise StateError(
                f"{image!r} is the image that the phases end in, not a snapshot of a machine; nothing was removed",
                hint="name GUEST:SNAPSHOT; vmtasks snapshots lists them",
            )
        if tag not in self.snapshots(guest):
            overlay.find_image(Place(state.config), tag)  # its error lists the snapshots
        records = {name: state.machine(name) for name in self.names()}
        label = state.config.label
        users = [name for name, record in records.items() if record and (record.guest, record.snapshot) == (label, tag)]
        if users:
            raise StateError(
                f"snapshot {image}: in use by {', '.join(users)}; nothing was removed",
                hint=f"vmtasks rm {users[0]}, or vmtasks restore {users[0]} {CLEAN}",
            )
        named = read_record(state.snapshot_record(tag), PhaseRecord)
        with prune.naming(state.store, state.config.vm_dir):
            state.snapshot_record(tag).unlink()
        return named is not None and prune.drop(state.store, named.digest, named.sha256)

    # -- reaping

    def reap(self) -> list[str]:
        """Remove expired machines and leftovers of half-made ones; returns the names. See reap.py."""
        return reap.reap(self._run(), self._open_place)

    # -- parts

    def _run(self) -> Path:
        return self.config().vm_dir / "run"

    def _open_place(self, name: str, config: Callable[..., Config] | None = None) -> Place:
        """The folder of a machine, with the configuration of its guest. `config`: self.config, or a cache of it."""
        config = config or self.config
        base = config()
        record = Workspace(base).machine(name)
        if record is not None and record.family and (record.family, record.version) != (base.guest.name, base.version):
            with suppress(ConfigError):  # the guest no longer exists: the machine can still be removed
                base = config(record.family, record.version)
        return Place(base if record is None else spec.config_for(base, record), name)

    def _open(self, name: str, config: Callable[..., Config] | None = None) -> Machine:
        place = self._open_place(name, config)
        return Machine(place.config, name)


def require_shipped_image(base: Config) -> None:
    """Record the store's image of the shipped guest as `clean`, for use without a project.

    StateError if the store lacks it: an image of a project's own version of the guest does not count.
    """
    from vmtasks.images.steps import Builder  # noqa: PLC0415 - 70 ms that most commands do not need

    lacks = Builder(base).adopt()
    if lacks:
        raise StateError(
            f"the store {base.store_dir} does not have {base.label} as shipped with vmtasks: it lacks {lacks}",
            hint=f"install it in a project: vmtasks init DIR --guest {base.guest.name}; cd DIR; doit auto_install",
        )
