"""Machines by name: start, stop, look, restore, snapshot, remove. A machine is a folder with a record; no daemon.

.vm/run/<name>/machine.toml  its record        disk.qcow2   its disk, an overlay on an image of the store
               <name>.pid, <name>.ports, <name>.log (the console), monitor and serial sockets, ssh_config (links)
"""

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from vmtasks import atomic, hardware, proc, progress, snapshots
from vmtasks.config import FALLBACK_PORTS, Config, show_size
from vmtasks.errors import MachineError, SshError, StateError, VmTasksError
from vmtasks.lock import lock
from vmtasks.machine import vm
from vmtasks.machine.argv import Spec, on_terminal
from vmtasks.machine.console import read_log
from vmtasks.machine.ports import port_free, port_holder
from vmtasks.media import disk
from vmtasks.remote import ssh
from vmtasks.state import CLEAN, MANUAL, MachineRecord, PhaseRecord, State
from vmtasks.store import ImageRecord, read_record, write_record

POWEROFF_S = 15.0
LOCK_S = 1800.0
LOGIN_S = 10.0
GENTLE = ("power off in the guest", "ACPI power button")
"""Rungs after which the guest's file systems are whole. Any other end is a power cut for them."""

Status = Literal["absent", "booting", "running", "stale", "stopped"]


@dataclass(frozen=True)
class View:
    """A machine as `status` shows it."""

    name: str
    status: Status
    record: MachineRecord | None
    ssh: str


class Machine:
    """One named machine of a project."""

    def __init__(self, config: Config, name: str = "") -> None:
        """`name` is by default the configured one. Nothing is touched yet."""
        self.config = config
        self.state = State(config)
        self.name = name or config.name
        self.folder = self.state.machine_folder(self.name)
        self._console_from = 0

    # -- places

    @property
    def disk(self) -> Path:
        """The overlay that holds what the machine has written."""
        return self.folder / "disk.qcow2"

    @property
    def console_log(self) -> Path:
        """Everything that the serial console has said."""
        return self.folder / f"{self.name}.log"

    @property
    def crashed(self) -> Path:
        """Is there while files in the guest may have lost what was written to them last."""
        return self.folder / "crashed"

    @property
    def key_cd(self) -> Path:
        """The CD that lets our key in, in the drive of a machine that was installed by hand."""
        return self.folder / "key.iso"

    @property
    def sockets(self) -> Path:
        """The short folder of the machine's sockets."""
        return vm.socket_folder(self.folder)

    def record(self) -> MachineRecord | None:
        """The machine's record; None when there is no machine."""
        return self.state.machine(self.name)

    def target(self, record: MachineRecord) -> ssh.Target:
        """The machine as ssh sees it."""
        return ssh.Target(
            self.name, record.ssh_port, record.ssh_user, self.state.key, tuple(record.host_keys), self.sockets
        )

    def snapshots(self) -> list[str]:
        """Names of this guest's snapshots."""
        own = sorted(p.stem for p in (self.config.guest_state / "snapshots").glob("*.toml"))
        return ([CLEAN] if self.state.snapshot_record(CLEAN).is_file() else []) + own

    # -- looking

    def pid(self, record: MachineRecord) -> vm.Pid | None:
        """The machine's process, if it still is that process."""
        pid = vm.Pid(record.pid, record.pid_started)
        return pid if record.pid and pid.alive(self._mark) else None

    def status(self) -> View:
        """What the machine is doing now. Takes no lock and waits at most for one try of SSH."""
        record = self.record()
        if record is None:
            return View(self.name, "absent", None, "")
        if self.pid(record) is None:
            return View(self.name, "stale" if record.pid else "stopped", record, "")
        target = self.target(record)
        line = proc.quote(["ssh", "-F", str(self.folder / "ssh_config"), self.name])
        return View(self.name, "running" if ssh.is_ready(target) else "booting", record, line)

    def running(self) -> ssh.Target:
        """The target of a machine that runs. StateError when it does not."""
        record = self.record()
        if record is None or self.pid(record) is None:
            raise StateError(f"machine {self.name} is not running", hint="doit start")
        return self.target(record)

    def image(self) -> ImageRecord:
        """The image that this machine starts from: that of the snapshot it was restored to, or `clean`."""
        record = self.record()
        return self._image(record.snapshot if record else CLEAN)

    # -- doing

    def start(self, note: Callable[[str], None] = progress.say) -> ssh.Target:
        """Have the machine running and SSH answering. A machine made from an older image is made anew, and says so."""
        with self._lock():
            record = self._ours()
            if record is not None and record.image:
                image = self.image()
                if record.image_sha256 != image.sha256:
                    note(f"machine {self.name}: its image was replaced by {image.digest[:12]}; it starts afresh")
                    self._stop(record, note)
                    record = self._make(record.snapshot, image)
            if record is not None and self.pid(record) is not None:
                return self._attach(record, note)
            if record is not None and record.pid:
                note(f"machine {self.name} ended without being stopped; the next sync looks into every file")
                self.crashed.touch()
            if record is None or not self.disk.is_file():
                record = self._make(record.snapshot if record else CLEAN, self.image())
            return self._boot(record)

    def empty(self, user: str, note: Callable[[str], None] = progress.say) -> None:
        """Give the machine an empty disk, for a person to install on, and log in as `user` once that is done."""
        with self._lock():
            record = self._ours()
            if record is not None:
                self._stop(record, note)
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (self.disk, self.folder / "ready", self.crashed):
                old.unlink(missing_ok=True)
            disk.create(self.disk, self.config.disk_size)
            self._write(
                MachineRecord(
                    name=self.name,
                    guest=self.config.label,
                    snapshot=MANUAL,
                    image="",
                    image_sha256="",
                    ssh_user=user,
                    host_keys=[],
                    changed=secrets.token_hex(8),
                )
            )

    def attend(
        self, cds: Sequence[Path], *, boot: str, display: str, note: Callable[[str], None] = progress.say
    ) -> int:
        """Boot the machine from `boot`, cd or disk, with its console on our terminal; returns QEMU's status.

        A person is there, so there is no deadline. StateError when it was not installed by hand.
        """
        with self._lock():
            record = self._ours()
            if record is None or record.image or not self.disk.is_file():
                raise StateError(f"machine {self.name} was not installed by hand", hint="doit install")
            self._stop(record, note)
            # Whoever is at the console may make new host keys, which the next start learns.
            self._write(msgspec.structs.replace(record, pid=0, pid_started="", host_keys=[]))
            spec = self._spec(self._free_port(), cds=tuple(cds), boot=boot)
            return proc.attach(on_terminal(spec, display))

    def amend(self, **values: Any) -> ssh.Target:
        """Change values of the running machine's record, and what ssh knows of it; returns its new target."""
        with self._lock():
            record = self._ours()
            if record is None or self.pid(record) is None:
                raise StateError(f"machine {self.name} is not running", hint="doit start")
            ssh.close(self.target(record))
            record = msgspec.structs.replace(record, **values)
            self._write(record)
            target = self.target(record)
            ssh.write_config(target)
            return target

    def stop(self, note: Callable[[str], None] = progress.say) -> str:
        """Stop the machine, gently first; returns the rung of the ladder that was needed."""
        with self._lock():
            record = self.record()
            if record is None:
                raise StateError(f"there is no machine {self.name}", hint="doit start")
            return self._stop(record, note)

    def restore(self, snapshot: str = "", note: Callable[[str], None] = progress.say) -> ImageRecord:
        """Throw away what the machine has written and go back to `snapshot`, by default the one it came from."""
        with self._lock():
            record = self._ours()
            name = snapshot or (record.snapshot if record else CLEAN)
            image = self._image(name)
            if record is not None:
                self._stop(record, note)
            self._make(name, image)
            return image

    def snapshot(self, name: str) -> ImageRecord:
        """Save the stopped machine's disk as a snapshot of its own, which needs no other image."""
        with self._lock():
            if self.state.snapshot_record(name) == self.state.clean_record:
                raise StateError("'clean' is the image that the phases end in; save the machine under another name")
            record = self._ours()
            if record is None or not self.disk.is_file():
                raise StateError(f"machine {self.name} has no disk to save", hint="doit start")
            if self.pid(record) is not None:
                raise StateError(f"machine {self.name} is running: its disk is not at rest", hint="doit stop")
            return snapshots.save(self.state, self.disk, record, name)

    def destroy(self, note: Callable[[str], None] = progress.say) -> list[Path]:
        """Stop the machine and remove all that belongs to it; returns what was removed."""
        if not self.folder.exists():
            return []
        with self._lock():
            record = self.record()
            if record is not None:
                self._stop(record, note)
            gone = sorted(self.folder.iterdir())
            shutil.rmtree(self.sockets, ignore_errors=True)
            shutil.rmtree(self.folder)
        return gone

    # -- parts

    def _ours(self) -> MachineRecord | None:
        """The record. StateError when the machine is of another guest or version, whose disk would be lost."""
        record = self.record()
        if record is not None and record.guest != self.config.label:
            raise StateError(
                f"machine {self.name} is of {record.guest}, and {self.config.label} was asked for; nothing was changed",
                hint=f"name=OTHER for a second machine, or doit name={self.name} destroy",
            )
        return record

    @property
    def _mark(self) -> str:
        """What only this machine's QEMU has in its command line."""
        return str(self.sockets / "qmp")

    def _lock(self) -> contextlib.AbstractContextManager[int]:
        """Be the only command at work on the machine. The lock is beside its folder, which destroy() removes."""
        what = f"machine {self.name}"
        return lock(
            self.folder.with_name(f".{self.name}.lock"),
            what,
            timeout_s=LOCK_S,
            waiting=lambda holder: progress.say(f"{what}: {holder} is at work on it; waiting"),
        )

    def _image(self, snapshot: str) -> ImageRecord:
        path = self.state.snapshot_record(snapshot)
        named = read_record(path, PhaseRecord)
        if named is None:
            there = ", ".join(self.snapshots()) or "none"
            raise StateError(f"there is no snapshot {snapshot!r}; there is: {there}", hint="doit auto_install")
        fault = self.state.image_fault(path)
        image = self.state.store.record(named.digest)
        if fault or image is None:
            raise StateError(f"snapshot {snapshot!r} cannot be used: {fault}", hint="doit auto_install")
        return image

    def _make(self, snapshot: str, image: ImageRecord) -> MachineRecord:
        """A fresh overlay and a record: a stopped machine that was never started."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (self.disk, self.folder / "ready", self.crashed, self.key_cd):
            old.unlink(missing_ok=True)
        size = max(image.virtual_size, self.config.disk_size)
        disk.overlay(self.disk, self.state.store.image(image.digest), size=size)
        record = MachineRecord(
            name=self.name,
            guest=self.config.label,
            snapshot=snapshot,
            image=image.digest,
            image_sha256=image.sha256,
            ssh_user=image.ssh_user,
            host_keys=image.host_keys,
        )
        self._write(record)
        return record

    def _boot(self, record: MachineRecord) -> ssh.Target:
        config, accel = self.config, self.state.accel
        vm.end_stray(self.sockets / "qmp")
        for old in (self.sockets / "ssh", self.sockets / "qmp", self.sockets / "serial"):
            old.unlink(missing_ok=True)
        history, key = self.state.store.history, f"start {self.config.label}"
        with progress.step(f"start {self.name}", expected_s=history.expected_s(key)) as step:
            step.now(f"boot ({accel.name}, {config.cpus} CPU, {show_size(config.memory)})")
            self._console_from = self.console_log.stat().st_size if self.console_log.exists() else 0
            pid, port = self._launch()
            record = msgspec.structs.replace(
                record,
                pid=pid.number,
                pid_started=pid.started,
                ssh_port=port,
                memory=config.memory,
                cpus=config.cpus,
                accel=accel.name,
                network=config.network,
                started=round(time.time(), 1),
            )
            self._write(record)
            try:
                target = self._wait(record)
            except BaseException as error:
                self._stop(record, lambda _: None, gentle=False)
                if isinstance(error, VmTasksError):
                    hint = "" if record.image else "doit install --disk: log in there and run key.sh from the CD"
                    raise SshError(error.message, log=self.console_log, console=self._tail(), hint=hint) from None
                raise
        history.record(key, step.elapsed_s)
        return target

    def _wait(self, record: MachineRecord) -> ssh.Target:
        """Wait until SSH answers.

        The host keys of a machine that was installed by hand are learned here, once: nobody is between us and a port
        that our own QEMU forwards.
        """
        deadline_s = self.config.guest.ssh.ready_timeout_s * self.state.accel.factor

        def alive() -> bool:
            self._heed()
            return self.pid(record) is not None

        if not record.host_keys:
            keys = ssh.learn_host_keys(record.ssh_port, timeout_s=deadline_s, alive=alive)
            record = msgspec.structs.replace(record, host_keys=keys)
            self._write(record)
            deadline_s = LOGIN_S  # its server answers, so that a login must succeed soon
        target = self.target(record)
        ssh.write_config(target)
        self._links(record)
        ssh.wait_ready(target, timeout_s=deadline_s, alive=alive)
        return target

    def _heed(self) -> None:
        """SshError when the console says that the boot has failed: no need to wait for the deadline."""
        transcript = read_log(self.console_log, self._console_from)
        for failure in self.config.guest.failures:
            if failure.cause != "login" and transcript.match(failure.expect):
                raise SshError(f"machine {self.name}: the guest {failure.says}")

    def _launch(self) -> tuple[vm.Pid, int]:
        """Start QEMU on the configured port, or with `auto` on the first free one of 2222 and the fallback range."""
        wanted = [self.config.ssh_port] if self.config.ssh_port else [2222, *FALLBACK_PORTS]
        for port in wanted:
            try:
                key = (self.key_cd,) if self.key_cd.is_file() else ()
                return vm.launch(self._spec(port, cds=key), self.folder / "qemu.log"), port
            except MachineError as error:
                if not vm.port_taken(error):
                    raise
        if self.config.ssh_port is None:
            taken = f"ports {wanted[0]} and {wanted[1]} to {wanted[-1]} are all taken"
            raise MachineError(taken, hint="doit stop, or port=N")
        free = next((p for p in FALLBACK_PORTS if p != wanted[0] and port_free(p)), None)
        holder = port_holder(wanted[0])
        offer = f"doit port={free} start, or port=auto" if free else "ports 22220 to 22229 are taken too; choose port=N"
        raise MachineError(f"port {wanted[0]} is taken{f' by {holder}' if holder else ''}", hint=offer)

    def _spec(self, port: int, **more: Any) -> Spec:
        return hardware.spec(
            self.config,
            self.state.accel,
            name=self.name,
            disk=self.disk.absolute(),
            network=self.config.network,
            ssh_port=port,
            console_socket=self.sockets / "serial",
            console_log=self.console_log.absolute(),
            qmp_socket=self.sockets / "qmp",
            pidfile=(self.folder / f"{self.name}.pid").absolute(),
            **more,
        )

    def _free_port(self) -> int:
        return self.config.ssh_port or next((p for p in (2222, *FALLBACK_PORTS) if port_free(p)), 2222)

    def _attach(self, record: MachineRecord, note: Callable[[str], None]) -> ssh.Target:
        """Use a machine that runs already; it may still be booting."""
        target = self._wait(record)
        note(f"machine {self.name} is running (pid {record.pid}, port {record.ssh_port})")
        has = {"memory": show_size(record.memory), "cpus": record.cpus, "network": record.network}
        asked = {"memory": show_size(self.config.memory), "cpus": self.config.cpus, "network": self.config.network}
        for key, value in has.items():
            if value != asked[key]:
                note(f"machine {self.name} keeps {key} {value} until it is stopped and started; asked was {asked[key]}")
        return target

    def _gentle(self, record: MachineRecord) -> list[vm.Rung]:
        """The rungs that let the guest put its file systems in order."""
        target, factor = self.target(record), self.state.accel.factor
        inside = ssh.script(self.config.guest.poweroff, cwd="/", env={}, user="root")

        def power_off() -> bool:
            reached = ssh.is_ready(target)
            if reached:
                proc.run(target.argv(ssh.remote_line(inside)), timeout_s=20, check=False)
            return reached

        return [
            (GENTLE[0], power_off, POWEROFF_S * factor),
            (GENTLE[1], vm.control(self.sockets / "qmp", "system_powerdown"), POWEROFF_S * factor / 2),
        ]

    def _stop(self, record: MachineRecord, note: Callable[[str], None], *, gentle: bool = True) -> str:
        """Down the ladder; afterwards the record says that the machine is at rest."""
        pid = self.pid(record)
        rung = "already stopped"
        if pid is not None:
            rungs = self._gentle(record) if gentle else []
            rung = vm.stop(pid, self._mark, rungs, self.sockets / "qmp")
            note(f"machine {self.name} stopped ({rung})")
        elif vm.end_stray(self.sockets / "qmp"):
            rung = "QMP quit"
            note(f"machine {self.name} stopped ({rung}): whoever started it was killed before it was recorded")
        if record.pid and rung not in GENTLE:
            self.crashed.touch()
        ssh.close(self.target(record))
        for leftover in (f"{self.name}.pid", f"{self.name}.ports"):
            (self.folder / leftover).unlink(missing_ok=True)
        for leftover in ("ssh", "qmp", "serial"):
            (self.sockets / leftover).unlink(missing_ok=True)
        self._write(msgspec.structs.replace(record, pid=0, pid_started=""))
        return rung

    def _write(self, record: MachineRecord) -> None:
        write_record(self.folder / "machine.toml", record)

    def _links(self, record: MachineRecord) -> None:
        """State files by the names that scripts expect: ports, and links to the sockets in their short folder."""
        atomic.write(self.folder / f"{self.name}.ports", f"ssh,{record.ssh_port}\n")
        places = {
            f"{self.name}-monitor.socket": "qmp",
            f"{self.name}-serial.socket": "serial",
            "ssh_config": "ssh_config",
        }
        for name, socket_name in places.items():
            link = self.folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(self.sockets / socket_name)

    def _tail(self) -> list[str]:
        return read_log(self.console_log, self._console_from).tail()
