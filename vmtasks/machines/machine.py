"""A machine by its name: start, stop, look, restore, snapshot, remove. A folder with a record; no daemon.

.vm/run/<name>/machine.toml  its record        disk.qcow2   its disk, an overlay on an image of the store
               <name>.pid, <name>.ports, <name>.log (the console), monitor and serial sockets, ssh_config (links)
               id_ed25519    its own key, if it has one     sessions/   who uses it now
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from vmtasks.config.load import show_size
from vmtasks.errors import StateError
from vmtasks.guest import ssh
from vmtasks.host import processes, progress
from vmtasks.host.locks import drop
from vmtasks.host.progress import Say
from vmtasks.images import prune, snapshots
from vmtasks.images.workspace import CLEAN, MANUAL, MachineRecord, PhaseRecord
from vmtasks.machines import binds, breakin, identity, start, stop
from vmtasks.machines.folder import Place
from vmtasks.media import disk
from vmtasks.qemu import checkpoint, qmp
from vmtasks.qemu.console import read_log
from vmtasks.qemu.events import Events
from vmtasks.store import qcow2
from vmtasks.store.store import ImageRecord, read_record

WINDOW_S = 180.0

if TYPE_CHECKING:
    from vmtasks.guest.link import Link

Status = Literal["absent", "booting", "damaged", "running", "unreachable", "paused", "panicked", "stale", "stopped"]
"""`damaged`: its record cannot be read, so that only `stop` and `rm` work. `unreachable`: SSH has answered since the
start and does not now. `paused`: its CPU stands, whoever stopped it."""


@dataclass(frozen=True)
class View:
    """A machine as `status` shows it."""

    name: str
    status: Status
    record: MachineRecord | None
    ssh: str
    fault: str = ""
    """Why its record cannot be read."""


class Machine(Place):
    """One named machine of a project."""

    # -- looking

    def status(self) -> View:
        """What the machine is doing now. Takes no lock and waits at most for one try of SSH."""
        record = self.state.machine(self.name)
        if record is None:
            fault = self.fault()
            return View(self.name, "damaged" if fault else "absent", None, "", fault)
        if self.pid(record) is None:
            return View(self.name, "stale" if record.pid else "stopped", record, "")
        return View(self.name, self._running(record), record, self.ssh_line())

    def _running(self, record: MachineRecord) -> Status:
        """What a machine is doing whose QEMU runs. Its CPU is asked first: SSH would only keep silent."""
        if state := self.stuck():
            return "panicked" if state == qmp.PANICKED else "paused"
        if ssh.is_ready(self.target(record)):
            return "running"
        return "unreachable" if record.ready else "booting"

    def running(self, note: Say = progress.say) -> ssh.Target:
        """The target of a machine that runs. StateError, which tells them apart, when it does not.

        One that had no space for its disk goes on, or MachineError says that there still is none.
        """
        record = self.record()
        if record is None:
            raise StateError(f"machine {self.name} is not running: there is none", hint=self.command("start"))
        if self.pid(record) is None:
            how = "its process has ended without being stopped" if record.pid else "it is stopped"
            raise StateError(f"machine {self.name} is not running: {how}", hint=self.command("start"))
        self.go_on(note)
        return self.target(record)

    def link(self, window_s: float = WINDOW_S) -> "Link":
        """A resilient connection to the running machine, for commands and jobs; see vmtasks.guest.link.

        `window_s`: how long the guest may take to come back. StateError when the machine does not run.
        """
        from vmtasks.guest.link import Link  # noqa: PLC0415 - paramiko takes 0.2 s

        record = self.record()
        target = self.running()
        now = self.console_log.stat().st_size if self.console_log.exists() else 0
        return Link(
            target,
            window_s=window_s,
            console=lambda: read_log(self.console_log).tail(),
            alive=start.Watch(self, record, now, patient=True) if record is not None else lambda: False,
            events=Events(self.events).boot,
        )

    def wait(self, note: Say = progress.say) -> ssh.Target:
        """The target of a machine that runs, once it lets us in. Quick for one that has done so before."""
        target = self.running()
        record = self.record()
        if record is None or record.ready:
            return target
        with self.lock():
            record = self.record()
            if record is None or self.pid(record) is None:
                return self.running()
            if not record.ready:
                note(f"machine {self.name}: waiting until it lets us in")
                return start.wait(self, record)
            return self.target(record)

    def image(self) -> ImageRecord:
        """The image that this machine starts from: that of the snapshot it was restored to, or `clean`."""
        record = self.record()
        return self.find_image(record.snapshot if record else CLEAN)

    def snapshots(self) -> list[str]:
        """Names of this guest's snapshots."""
        own = sorted(p.stem for p in (self.config.guest_state / "snapshots").glob("*.toml"))
        return ([CLEAN] if self.state.snapshot_record(CLEAN).is_file() else []) + own

    # -- doing

    def start(self, note: Say = progress.say, *, die_with_us: bool = False) -> ssh.Target:
        """Have the machine running and SSH answering. A machine made from an older image is made anew, and says so.

        One that `vmtasks run` has made keeps its disk: only its maker knows what is on it.
        """
        with self.lock():
            record = self.ours()
            if record is not None and record.image and not record.own:
                image = self.image()
                if record.image_sha256 != image.sha256:
                    note(f"machine {self.name}: its image was replaced by {image.digest[:12]}; it starts afresh")
                    stop.stop(self, record, note)
                    record = self.make(record.snapshot)
            if record is not None and self.pid(record) is not None:
                return self._attach(record, note)
            if record is not None and record.pid:
                note(f"machine {self.name} ended without being stopped; the next sync looks into every file")
                self.crashed.touch()
            if record is None or not self.disk.is_file():
                if record is not None and record.started:
                    note(f"machine {self.name}: its disk {self.disk} is gone, and what was on it; it starts afresh")
                record = self.make(record.snapshot if record else CLEAN, record)
            else:
                self._require_image(record)
            return start.boot(self, record, die_with_us=die_with_us)

    def empty(self, user: str, note: Say = progress.say) -> None:
        """Give the machine an empty disk, for a person to install on, and log in as `user` once that is done."""
        with self.lock():
            record = self.ours()
            if record is not None:
                stop.stop(self, record, note)
            self.make_folder()
            for old in (self.disk, self.folder / "ready", self.crashed):
                old.unlink(missing_ok=True)
            self.write(
                MachineRecord(
                    name=self.name,
                    guest=self.config.label,
                    snapshot=MANUAL,
                    image="",
                    image_sha256="",
                    ssh_user=user,
                    host_keys=[],
                    mac=identity.mac(self.folder),
                    changed=secrets.token_hex(8),
                )
            )
            disk.create(self.disk, self.config.disk_size)

    def attend(self, cds: Sequence[Path], *, boot: str, display: str, note: Say = progress.say) -> int:
        """Boot the machine from `boot`, cd or disk, with its console on our terminal; returns QEMU's status.

        A person is there, so there is no deadline. StateError when it was not installed by hand.
        """
        with self.lock():
            record = self.ours()
            if record is None or record.image or not self.disk.is_file():
                raise StateError(f"machine {self.name} was not installed by hand", hint="doit install")
            stop.stop(self, record, note)
            # Whoever is at the console may make new host keys, which the next start learns.
            record = self.write(msgspec.structs.replace(record, pid=0, pid_started="", host_keys=[]))
            return start.on_terminal(self, record, display, cds=tuple(cds), boot=boot)

    def amend(self, **values: Any) -> ssh.Target:
        """Change values of the running machine's record, and what ssh knows of it; returns its new target."""
        with self.lock():
            record = self.ours()
            if record is None or self.pid(record) is None:
                raise StateError(f"machine {self.name} is not running", hint=self.command("start"))
            ssh.close(self.target(record))
            target = self.target(self.write(msgspec.structs.replace(record, **values)))
            ssh.write_config(target)
            return target

    def stop(self, note: Say = progress.say, *, gentle: bool = True, timeout_s: float | None = None) -> str:
        """Stop the machine, gently first; returns the rung of the ladder that was needed.

        `timeout_s`: how long each gentle rung may take. What is newer in copied binds comes back first; what cannot is
        said. Not `gentle`: another command that is at work on the machine is ended. Without a record that can be read,
        what can be found of the machine is stopped.
        """
        with self._alone(force=not gentle) as cut:
            record, fault = self.state.machine(self.name), self.fault()
            if record is None and not fault:
                if cut:  # who was at work on it has removed it
                    return cut
                raise StateError(f"there is no machine {self.name}", hint=self.command("start"))
            if fault:
                self._say_fault(fault)
            if gentle and record is not None and self.pid(record) is not None:
                gentle = stop.roused(self, note)
                if gentle and record.ready:
                    binds.after(self, record, last=record.throwaway)
            rung = stop.stop(self, record, note, gentle=gentle, timeout_s=timeout_s)
            return cut if rung == stop.AT_REST and cut else rung

    def restore(self, snapshot: str = "", note: Say = progress.say) -> ImageRecord:
        """Throw away what the machine has written and go back to `snapshot`, by default the one it came from."""
        with self.lock():
            record = self.ours()
            name = snapshot or (record.snapshot if record else CLEAN)
            image = self.find_image(name)
            if record is not None:
                stop.stop(self, record, note, gentle=False)
            self.make(name, record)
            return image

    def snapshot(self, name: str) -> ImageRecord:
        """Save the stopped machine's disk as a snapshot of its own, which needs no other image."""
        with self.lock():
            if self.state.snapshot_record(name) == self.state.clean_record:
                raise StateError("'clean' is the image that the phases end in; save the machine under another name")
            record = self.ours()
            if record is None or not self.disk.is_file():
                raise StateError(f"machine {self.name} has no disk to save", hint=self.command("start"))
            if self.pid(record) is not None:
                raise StateError(f"machine {self.name} is running: its disk is not at rest", hint=self.command("stop"))
            image = self._require_image(record)
            with self.state.store.explaining(image, self._lost()):
                return snapshots.save(self.state, self.disk, record, name, self.keys_inside(record))

    def keep_moment(self, tag: str) -> None:
        """Keep RAM, devices and disk of the running machine under a name, inside its disk; it runs on."""
        self.running()
        checkpoint.save(self.qmp, tag)

    def back_to_moment(self, tag: str) -> ssh.Target:
        """Go back to what keep_moment() has kept. Connections are not part of it: those that OpenSSH shares are ended.

        Who has a link() must close it.
        """
        target = self.running()
        checkpoint.load(self.qmp, tag)
        ssh.close(target)
        return target

    def destroy(self, note: Say = progress.say, *, force: bool = False) -> list[Path]:
        """Stop the machine and remove all that belongs to it; returns what was removed.

        Nothing is kept of its disk, so that its power is simply cut; what is newer in copied binds comes back first,
        and what cannot is said. `force`: another command that is at work on the machine is ended. MachineError, and
        nothing is removed, when something of it runs that is not ours to end.
        """
        if not self.folder.exists():
            return []
        with self._alone(force=force):
            return self.remove(note, wait_s=breakin.LETS_GO_S if force else binds.COPY_S)

    def remove(self, note: Say, *, wait_s: float = 0.0) -> list[Path]:
        """As destroy(), for who holds the machine's lock. `wait_s`: how long others may still copy binds."""
        if not self.folder.exists():  # somebody else was first
            return []
        record = self.state.machine(self.name)
        if record is None and (fault := self.fault()):
            self._say_fault(fault)
        try:
            # Nobody has tried yet where it was ours: not even if it has ended by itself.
            there = record is not None and (record.owner == os.getpid() or self.pid(record) is not None)
            if record is not None and record.ready and record.binds and there and stop.roused(self, note):
                binds.after(self, record, last=True, wait_s=wait_s)
        finally:  # who interrupts the copying is rid of the machine all the same
            gone = self._remove(record, note)
        return gone

    def _remove(self, record: MachineRecord | None, note: Say) -> list[Path]:
        """Cut its power, and remove all that belongs to it."""
        stop.stop(self, record, note, gentle=False)
        gone = sorted(self.folder.iterdir())
        shutil.rmtree(self.sockets, ignore_errors=True)
        # The record goes last: what a kill leaves half removed can still be listed, and removed again.
        for path in sorted(gone, key=lambda path: path.name == "machine.toml"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        self.folder.rmdir()
        return gone

    # -- parts

    @contextlib.contextmanager
    def _alone(self, *, force: bool) -> Iterator[str]:
        """Hold the machine's lock. Gives the rung that has ended the machine, where that was needed to have it."""
        with contextlib.ExitStack() as stack:
            if force:
                cut = stack.enter_context(breakin.lock(self))
            else:
                cut = ""
                stack.enter_context(self.lock())
            try:
                yield cut
            finally:
                if not self.folder.exists():
                    drop(self.lock_file)

    def _say_fault(self, fault: str) -> None:
        """What is not known without the record, and therefore not done."""
        progress.say(
            f"machine {self.name}: its record cannot be read: {fault}; what runs of it is looked for, and nothing is "
            "copied back from its binds"
        )
        number, found = self.number_told(), self.process()
        if number and processes.started(number) and (found is None or found.number != number):
            progress.say(f"machine {self.name}: process {number}, which its pid file names, is not provably its QEMU")

    def ours(self) -> MachineRecord | None:
        """The record. StateError when the machine is of another guest or version, whose disk would be lost."""
        record = self.record()
        if record is not None and record.guest != self.config.label:
            raise StateError(
                f"machine {self.name} is of {record.guest}, and {self.config.label} was asked for; nothing was changed",
                hint=f"name=OTHER for a second machine, or doit name={self.name} destroy",
            )
        return record

    def find_image(self, snapshot: str) -> ImageRecord:
        """The image of a snapshot. StateError when there is none, or when it cannot be used."""
        path = self.state.snapshot_record(snapshot)
        named = read_record(path, PhaseRecord)
        if named is None:
            there = ", ".join(self.snapshots()) or "none"
            what = f"there is no snapshot {snapshot!r} of {self.config.guest.name}; there is: {there}"
            raise StateError(what, hint=self._image_hint(snapshot))
        image, fault = self.state.store.find(named.digest, named.sha256, look="sample")
        if image is None:
            raise StateError(f"snapshot {snapshot!r} cannot be used: {fault}", hint=self._image_hint(snapshot))
        return image

    def _image_hint(self, snapshot: str) -> str:
        """Only `clean` is something that a task makes."""
        return "doit auto_install" if snapshot == CLEAN else f"vmtasks snapshots {self.config.guest.name}"

    def make(self, snapshot: str, like: MachineRecord | None = None) -> MachineRecord:
        """A fresh overlay and a record: a stopped machine that was never started. It keeps to what `like` was asked.

        The record is there before the overlay, which appears whole: a machine without one gets it when it starts.
        """
        with prune.naming(self.state.store, self.config.vm_dir):
            image, beside = self.find_image(snapshot), self.disk.with_suffix(".new")
            self.make_folder()
            for old in (self.disk, beside, self.folder / "ready", self.crashed, self.key_cd):
                old.unlink(missing_ok=True)
            record = self._write_fresh(snapshot, image, like)
            size = max(image.virtual_size, self.config.disk_size)
            with self.state.store.explaining(image, self._image_hint(snapshot)):
                disk.overlay(beside, self.state.store.image(image), size=size)
            beside.rename(self.disk)
        return record

    def _write_fresh(self, snapshot: str, image: ImageRecord, like: MachineRecord | None) -> MachineRecord:
        fresh = MachineRecord(
            name=self.name,
            guest=self.config.label,
            snapshot=snapshot,
            image=image.digest,
            image_sha256=image.sha256,
            ssh_user=image.ssh_user,
            host_keys=image.host_keys,
            mac=identity.mac(self.folder),
            family=self.config.guest.name,
            version=self.config.version,
            created=round(time.time(), 1),
        )
        if like is not None and like.own:
            kept = ("own", "throwaway", "owner", "owner_started", "login", "authorized", "disk_size", "want_port")
            more = ("binds", "memory", "cpus", "network", "created")
            same = {name: getattr(like, name) for name in (*kept, *more)}
            fresh = msgspec.structs.replace(fresh, **same, want_forwards=[*map(str, start.asked(like))])
        return self.write(fresh)

    def _require_image(self, record: MachineRecord) -> ImageRecord | None:
        """The image that the machine's disk stands on; None if it was installed by hand.

        StateError unless that still has the bytes that the disk was made on. A store that was moved is followed.
        """
        if not record.image:
            return None
        if not os.access(self.disk, os.R_OK | os.W_OK):
            raise StateError(
                f"machine {self.name} cannot use its disk {self.disk}: it is another user's, or its mode forbids it",
                hint=f"look at it: ls -l {self.disk}; it is to belong to you, with mode 0600",
            )
        store, told = self.state.store, qcow2.header(self.disk)
        image, fault = store.find(record.image, record.image_sha256, look="sample")
        at = Path(told.backing) if told else None
        if at is None:
            fault = f"{self.disk.name} is no qcow2 image"
        elif image is not None and at.name != store.image(image).name:
            fault = f"{self.disk.name} stands on {at.name}"
        if image is None or at is None or fault:
            raise StateError(
                f"machine {self.name} was made on image {record.image[:12]}, and that cannot be used: {fault}",
                hint=self._lost(),
            )
        if at != store.image(image).absolute():
            disk.reback(self.disk, store.image(image))
        return image

    def _lost(self) -> str:
        """What to do when the image below a machine's disk is gone or damaged."""
        record = self.record()
        restore = f"vmtasks restore {self.name}" if record is not None and record.own else "doit restore"
        return (
            f"put the file back from a copy of the store, then vmtasks doctor --store; "
            f"or {restore}, and what the machine has written is lost"
        )

    def keys_inside(self, record: MachineRecord) -> Path | None:
        """The private key that the machine's disk lets in, if it is not the store's."""
        key = self.own_key if record.key == "own" else self.door_key(record)
        return None if key == self.state.key else key

    def _attach(self, record: MachineRecord, note: Callable[[str], None]) -> ssh.Target:
        """Use a machine that runs already; it may still be booting."""
        self.go_on(note)
        target = start.wait(self, record)
        note(f"machine {self.name} is running (pid {record.pid}, port {record.ssh_port})")
        has = {"memory": show_size(record.memory), "cpus": record.cpus, "network": record.network}
        asked = {"memory": show_size(self.config.memory), "cpus": self.config.cpus, "network": self.config.network}
        for key, value in has.items():
            if value != asked[key]:
                note(f"machine {self.name} keeps {key} {value} until it is stopped and started; asked was {asked[key]}")
        return target
