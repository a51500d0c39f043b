"""The machines of one project, or of no project at all: list them, make one, find one, reap those left by the dead."""

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmtasks import arguments, config, proc, rules, tidy
from vmtasks.arguments import Bind, Forward, PublicKey
from vmtasks.config import CONFIG_PATH, Config, show_size
from vmtasks.errors import ConfigError, MachineError, StateError
from vmtasks.explain import nearest
from vmtasks.machine import vm
from vmtasks.private import Private
from vmtasks.progress import Say
from vmtasks.session import binds
from vmtasks.session.machine import Machine
from vmtasks.state import CLEAN, MachineRecord, PhaseRecord, State
from vmtasks.store import read_record, write_record

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
            return config.without_project(given, self.environ)
        made = config.load(self.root, given, self.environ)
        rules.check(made)
        return made

    # -- looking

    def names(self) -> list[str]:
        """The names of all machines, sorted."""
        return sorted(path.parent.name for path in self._run().glob("[!.]*/machine.toml"))

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
        if self.root is None:
            tidy.register(State(base).store, base.vm_dir)
            adopt(State(base))
        return Machine(base)

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
        state = State(base)
        tidy.register(state.store, base.vm_dir)
        if self.root is None:
            adopt(state)
        image = Machine(base).find_image(snapshot or CLEAN)
        size = wants.disk_size or max(base.disk_size, image.virtual_size)
        if size < image.virtual_size:
            raise ConfigError(
                f"--disk {show_size(size)}: less than the image's {show_size(image.virtual_size)}; use that or more"
            )
        record = MachineRecord(
            name="",
            guest=base.label,
            snapshot=snapshot or CLEAN,
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
            owner_started=proc.started(owner) if owner else "",
            authorized=[str(key) for key in wants.authorized],
            login=wants.user,
            disk_size=size,
            want_port=wants.ssh_port,
            want_forwards=[str(forward) for forward in wants.forwards],
            binds=bound,
            created=round(time.time(), 1),
        )
        return Machine(adapted(base, record), self._claim(wants.name, base, record))

    def _claim(self, name: str, base: Config, record: MachineRecord) -> str:
        """Take a name by renaming a folder that holds the record already: there is no machine without one."""
        run = self._run()
        run.mkdir(parents=True, exist_ok=True)
        staged = run / f"{STAGED}{os.getpid()}-{secrets.token_hex(4)}"
        staged.mkdir()
        try:
            number = 0
            while True:
                number += 1
                chosen = name or f"{base.guest.name}-{number}"
                write_record(staged / "machine.toml", msgspec.structs.replace(record, name=chosen))
                try:
                    staged.rename(run / chosen)  # fails on a folder that is not empty
                except OSError:
                    if name:
                        raise StateError(
                            f"there is a machine {name!r} already", hint=f"vmtasks rm {name}, or choose another --name"
                        ) from None
                else:
                    return chosen
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    # -- reaping

    def reap(self, note: Say) -> list[str]:
        """Remove machines that went with a process which is gone, and what half-made ones have left; their names."""
        gone = []
        with suppress(MachineError, OSError):
            vm.reap_sockets()
        for path in sorted(self._run().glob(f"{STAGED}*")):
            if not proc.started(int(path.name.removeprefix(STAGED).partition("-")[0] or 0)):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._run().glob("[!.]*"):
            with suppress(OSError):
                path.rmdir()  # only an empty one goes
        for lock in self._run().glob(".*.lock"):
            self._drop_lock(lock)
        for machine in self.machines():
            record = machine.record()
            if record is None:
                continue
            if record.owner:
                why, over = (
                    "the command that it belonged to is gone",
                    proc.started(record.owner) != record.owner_started,
                )
            else:
                why, over = "it has ended", record.throwaway and bool(record.pid) and machine.pid(record) is None
            with suppress(StateError):  # somebody is at work on it
                if over:
                    machine.destroy(lambda _: None, lock_s=0)
                    gone.append(machine.name)
                    note(f"machine {machine.name}: removed, because {why}")
        return gone

    def _drop_lock(self, lock: Path) -> None:
        """Remove the lock of a machine that is gone."""
        name = lock.name.removeprefix(".").removesuffix(".lock")
        if (self._run() / name).exists():
            return
        with suppress(StateError, OSError), Machine(self.config(), name).lock(0):
            if not (self._run() / name).exists():
                lock.with_suffix(".owner").unlink(missing_ok=True)
                lock.unlink()

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


def adopt(state: State) -> None:
    """Without a project, `clean` is the newest intact image of the guest's last phase that the store has."""
    if not state.image_fault(state.clean_record):
        return
    last, guest = state.config.guest.phases[-1].name, state.config.guest.name
    for image in reversed(state.store.records()):
        if (image.guest, image.version, image.name) == (guest, state.config.version, last):
            found, _ = state.store.find(image.digest)
            if found is not None:
                write_record(state.clean_record, PhaseRecord(digest=found.digest, sha256=found.sha256))
                return
    if read_record(state.clean_record, PhaseRecord) is None:
        raise StateError(
            f"the store {state.store.root} has no image of {guest}",
            hint="install it in a project: vmtasks init DIR, then doit auto_install there",
        )
