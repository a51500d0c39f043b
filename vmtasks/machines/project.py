"""The machines of one project, or of no project at all: list them, make one, find one, reap those left by the dead."""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmtasks.config import arguments, load, rules
from vmtasks.config.arguments import Bind, Forward, PublicKey
from vmtasks.config.load import CONFIG_PATH, Config, show_size
from vmtasks.config.mistakes import nearest
from vmtasks.errors import BusyError, ConfigError, MachineError, StateError, VmTasksError
from vmtasks.host import files, processes
from vmtasks.host.locks import drop
from vmtasks.host.progress import Say
from vmtasks.images import prune
from vmtasks.images.private import Private
from vmtasks.images.workspace import CLEAN, MachineRecord, PhaseRecord, State
from vmtasks.machines import binds, identity
from vmtasks.machines.machine import Machine
from vmtasks.qemu import vm
from vmtasks.store.store import read_record, write_record

STAGED = ".new-"


@dataclass(frozen=True)
class Wants:
    """What a machine of its own is to be. What is None or empty is as the project, or else the guest, has it.

    `memory` and `disk_size` in bytes. `ssh_port` 0: 2222, or the first free one of 22220 to 22229, or else any.
    """

    image: str = ""
    name: str = ""
    memory: int | None = None
    cpus: int | None = None
    disk_size: int | None = None
    network: str = ""
    ssh_port: int = 0
    forwards: tuple[Forward, ...] = ()
    binds: tuple[Bind, ...] = ()
    authorized: tuple[PublicKey, ...] = ()
    user: str = ""
    throwaway: bool = False


class Project:
    """Where machines are, and what they are made from."""

    def __init__(
        self, root: Path | None, environ: Mapping[str, str] = os.environ, variables: Mapping[str, str] | None = None
    ) -> None:
        """`root` holds config/vm.toml; None: no project, only the guests that come with vmtasks.

        `variables` are those of doit's command line.
        """
        self.root = root
        self.environ = environ
        self.variables = variables or {}

    @classmethod
    def find(cls, start: Path, environ: Mapping[str, str] = os.environ) -> "Project":
        """The project that `start` is in, or none. VM_CONFIG names its file where that is another."""
        if environ.get("VM_CONFIG"):
            return cls(start, environ)
        found = (folder for folder in (start, *start.parents) if (folder / CONFIG_PATH).is_file())
        return cls(next(found, None), environ)

    def config(self, guest: str = "", version: str = "") -> Config:
        """The configuration, for another guest than the configured one if one is named. ConfigError as always."""
        given = {name: value for name, value in self.variables.items() if not (guest and name in ("guest", "version"))}
        given |= {name: value for name, value in (("guest", guest), ("version", version)) if value}
        if self.root is None:
            return load.without_project(given, self.environ)
        made = load.load(self.root, given, self.environ)
        rules.check(made)
        return made

    # -- looking

    def names(self) -> list[str]:
        """The names of all machines, sorted; also of those whose record cannot be read."""
        return State(self.config()).machine_names()

    def own_machines(self) -> list[Machine]:
        """The machines that `vmtasks run` has made. One whose record cannot be read may be anybody's."""
        found = [self._open(name) for name in self.names()]
        return [one for one in found if (record := one.state.machine(one.name)) is not None and record.own]

    def guests(self) -> list[str]:
        """The names of the guests that this project has, or that come with vmtasks, sorted."""
        phases = (self.root or load.shipped()) / load.PHASES_PATH
        return sorted(path.parent.name for path in phases.glob("*/guest.toml"))

    def snapshots(self, guest: str = "") -> list[str]:
        """The snapshots of a guest, by default the configured one."""
        return Machine(self.config(guest)).snapshots()

    def machine(self, name: str = "") -> Machine:
        """The machine of this name, by default the configured one. StateError when there is none."""
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
        """The configured machine, whether or not it is there yet."""
        base = self.config()
        machine = Machine(base)
        if self.root is None and machine.record() is None:
            adopt(base)
        return machine

    def machines(self) -> Iterator[Machine]:
        """All machines whose guest is known here."""
        for name in self.names():
            with suppress(ConfigError, StateError):
                yield self._open(name)

    # -- making

    def create(self, wants: Wants, *, owner: int = 0) -> Machine:
        """A stopped machine with its record; it lives only as long as the process `owner`, if that is given.

        ConfigError for what it cannot be, StateError for a name that is taken. Nothing of it is left then.
        """
        guest, snapshot = arguments.image(wants.image)
        arguments.apart(wants.binds)
        arguments.distinct(wants.ssh_port, wants.forwards)
        base = self.config(guest)
        private = Private(base)
        bound = [binds.check(bind, private) for bind in wants.binds]
        possible(base, wants)
        snapshot = snapshot or CLEAN
        if self.root is None and snapshot == CLEAN:
            adopt(base)
        with prune.naming(State(base).store, base.vm_dir):
            record = msgspec.structs.replace(self._first_record(base, wants, snapshot, owner), binds=bound)
            return Machine(adapted(base, record), self._claim(wants.name, base, record))

    def _first_record(self, base: Config, wants: Wants, snapshot: str, owner: int) -> MachineRecord:
        """What is asked for, without a name yet."""
        image = Machine(base).find_image(snapshot)
        size = wants.disk_size or max(base.disk_size, image.virtual_size)
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
            memory=wants.memory or base.memory,
            cpus=wants.cpus or base.cpus,
            network=wants.network or base.network,
            family=base.guest.name,
            version=base.version,
            own=True,
            throwaway=wants.throwaway,
            owner=owner,
            owner_started=processes.started(owner) if owner else "",
            authorized=[str(key) for key in wants.authorized],
            login=wants.user,
            disk_size=size,
            want_port=wants.ssh_port,
            want_forwards=[str(forward) for forward in wants.forwards],
            created=round(time.time(), 1),
        )

    def _claim(self, name: str, base: Config, record: MachineRecord) -> str:
        """Take a name by renaming a folder that holds the record already: there is no machine without one."""
        run = self._run()
        files.private_folder(run.parent)
        run.mkdir(exist_ok=True)
        staged = run / f"{STAGED}{os.getpid()}-{secrets.token_hex(4)}"
        staged.mkdir(mode=0o700)
        try:
            number = 0
            while True:
                number += 1
                chosen = name or f"{base.guest.name}-{number}"
                named = msgspec.structs.replace(record, name=chosen, mac=identity.mac(run / chosen))
                write_record(staged / "machine.toml", named)
                if self._take(staged, Machine(base, chosen)):
                    return chosen
                if name:
                    raise StateError(
                        f"there is a machine {name!r} already", hint=f"vmtasks rm {name}, or choose another --name"
                    )
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _take(self, staged: Path, machine: Machine) -> bool:
        """Give what is staged the machine's name; False when it is taken, or somebody is at work on it."""
        try:
            with machine.lock(0, say=False):
                staged.rename(machine.folder)  # fails on a folder that is not empty
        except BusyError:
            return False
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        return True

    def remove_snapshot(self, image: str) -> bool:
        """Remove `GUEST:SNAPSHOT`, and its image where no record of any project names it; False where one may.

        StateError when there is no such snapshot, or a machine stands on it.
        """
        guest, tag = arguments.image(image)
        state = State(self.config(guest))
        if not tag or state.snapshot_record(tag) == state.clean_record:
            raise StateError(
                f"{image!r} is what the phases end in, and no snapshot of a machine; nothing was removed",
                hint="name GUEST:SNAPSHOT; vmtasks snapshots lists them",
            )
        if tag not in self.snapshots(guest):
            Machine(state.config).find_image(tag)  # says what there is
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

    def reap(self, note: Say) -> list[str]:
        """Remove machines that went with a process which is gone, and what half-made ones have left; their names.

        What somebody is at work on is left alone. A machine that cannot be removed is a warning: nothing here may keep
        a command from its own work.
        """
        with suppress(MachineError, OSError):
            vm.reap_sockets()
        run, gone = self._run(), []
        for path in sorted(run.iterdir()) if run.is_dir() else ():
            if path.name.startswith("."):
                self._drop_leftover(path)
                continue
            try:
                why = self._reap_machine(path)
            except BusyError:
                continue
            except (VmTasksError, OSError) as error:
                note(f"warning: machine {path.name} is over and could not be removed: {error}")
                continue
            if why:
                gone.append(path.name)
                note(f"machine {path.name}: removed, because {why}")
        return gone

    def _reap_machine(self, folder: Path) -> str:
        """Remove a machine that is over; returns why it was, or nothing. An empty folder goes too."""
        machine = self._open(folder.name)
        if not why_over(machine) and not _empty(folder):
            return ""
        with machine.lock(0, say=False):  # and again: it may be another machine of that name by now
            if why := why_over(machine):
                machine.remove(lambda _: None)
            elif _empty(folder):
                folder.rmdir()
            if not folder.exists():
                drop(machine.lock_file)
            return why

    def _drop_leftover(self, path: Path) -> None:
        """Remove what was staged by a process that is gone, or the lock of a machine that is."""
        staged = re.fullmatch(rf"{re.escape(STAGED)}(\d+)-.*", path.name)
        if staged is not None and not processes.started(int(staged[1])):
            shutil.rmtree(path, ignore_errors=True)
        if path.suffix != ".lock":
            return
        machine = Machine(self.config(), path.stem.removeprefix("."))
        if machine.folder.exists():
            return
        with suppress(StateError, OSError), machine.lock(0, say=False):
            if not machine.folder.exists():
                drop(path)

    # -- parts

    def _run(self) -> Path:
        return self.config().vm_dir / "run"

    def _open(self, name: str) -> Machine:
        base = self.config()
        record = State(base).machine(name)
        if record is not None and record.family and (record.family, record.version) != (base.guest.name, base.version):
            with suppress(ConfigError):  # a guest that is not there any more: the machine can still be removed
                base = self.config(record.family, record.version)
        return Machine(base if record is None else adapted(base, record), name)


def why_over(machine: Machine) -> str:
    """Why a machine is of no more use, as its record tells; empty when it is, or when that cannot be known."""
    record = machine.state.machine(machine.name)
    if record is None:
        return ""
    if record.owner:
        over = processes.started(record.owner) != record.owner_started
        return "the command that it belonged to is gone" if over else ""
    return "it has ended" if record.throwaway and record.pid and machine.pid(record) is None else ""


def _empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def possible(base: Config, wants: Wants) -> None:
    """ConfigError, naming the option, for what this host cannot give or no guest can use."""
    asked = (
        ("memory", "memory", "--memory", wants.memory),
        ("cpus", "cpus", "--cpus", wants.cpus),
        ("disk", "disk_size", "--disk", wants.disk_size),
        ("port", "ssh_port", "--ssh-port", wants.ssh_port or None),
    )
    given = [row for row in asked if row[-1] is not None]
    made = msgspec.structs.replace(base, **{field: value for _, field, _, value in given})
    names = {name: option for name, _, option, _ in given}
    for problem in (*rules.forwards(wants.forwards), *rules.machine(made, names)):
        raise ConfigError(problem)


def adapted(base: Config, record: MachineRecord) -> Config:
    """The configuration with what a machine of its own was asked to be."""
    if not record.own:
        return base
    return msgspec.structs.replace(
        base,
        name=record.name,
        memory=record.memory,
        cpus=record.cpus,
        network=record.network,
        disk_size=record.disk_size,
        ssh_port=record.want_port or None,
    )


def adopt(base: Config) -> None:
    """Without a project, `clean` is the image that the store has of the guest as it comes with vmtasks.

    StateError when the store does not have it: what somebody's project has made of the guest is that project's.
    """
    from vmtasks.images.steps import Builder  # noqa: PLC0415 - 70 ms that most commands have no use for

    lacks = Builder(base).adopt()
    if lacks:
        raise StateError(
            f"the store {base.store_dir} does not have {base.label} as it comes with vmtasks: it lacks {lacks}",
            hint=f"install it in a project: vmtasks init DIR --guest {base.guest.name}; cd DIR; doit auto_install",
        )
