"""A machine's life cycle, one command at a time: start, stop, restore, snapshot, remove, install by hand.

Functions on the machine's folder. Each takes its lock, reports to the observer, and leaves the record correct.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmtasks.config.load import show_size
from vmtasks.errors import StateError
from vmtasks.guest import ssh
from vmtasks.host import processes, progress
from vmtasks.host.locks import drop
from vmtasks.images.workspace import CLEAN, MANUAL, MachineRecord
from vmtasks.machines import binds, identity, overlay, start, takeover
from vmtasks.machines import stop as ladder
from vmtasks.machines.folder import Place
from vmtasks.media import disk
from vmtasks.store.records import ImageRecord


def require_running(place: Place) -> ssh.Target:
    """The target of a running machine. StateError, with the reason, if it does not run.

    Resumes a machine that was paused by a full disk; MachineError if the disk is still full.
    """
    record = place.record()
    if record is None:
        raise StateError(f"machine {place.name} is not running: it does not exist", hint=place.command("start"))
    if place.pid(record) is None:
        how = "its process ended without being stopped" if record.pid else "it is stopped"
        raise StateError(f"machine {place.name} is not running: {how}", hint=place.command("start"))
    place.resume_if_full()
    return place.target(record)


def wait_ready(place: Place) -> ssh.Target:
    """Wait until a running machine accepts a login; returns its target. Quick if it has before."""
    target = require_running(place)
    record = place.record()
    if record is None or record.ready:
        return target
    with place.lock():
        record = place.record()
        if record is None or place.pid(record) is None:
            return require_running(place)
        if not record.ready:
            progress.say(f"machine {place.name}: waiting for its SSH login")
            return start.wait(place, record)
        return place.target(record)


def require_same_guest(place: Place) -> MachineRecord | None:
    """The record. StateError if the machine has another guest or version: its disk would be lost."""
    record = place.record()
    if record is not None and record.guest != place.config.label:
        raise StateError(
            f"machine {place.name} has guest {record.guest}, not {place.config.label}; nothing was changed",
            hint=f"name=OTHER for a second machine, or doit name={place.name} destroy",
        )
    return record


def start_up(place: Place, *, die_with_us: bool = False) -> ssh.Target:
    """Start the machine unless it runs, and wait for SSH. Recreates a machine of an older image, with a message.

    A machine of `vmtasks run` keeps its disk: only its user knows its contents.
    """
    with place.lock():
        record = require_same_guest(place)
        if record is not None and record.image and not record.own:
            image = overlay.find_image(place, record.snapshot)
            if record.image_sha256 != image.sha256:
                progress.say(f"machine {place.name}: its image was replaced by {image.digest[:12]}; it starts afresh")
                ladder.stop(place, record)
                record = overlay.make(place, record.snapshot)
        if record is not None and place.pid(record) is not None:
            return _use_running(place, record)
        if record is not None and record.pid:
            progress.say(f"machine {place.name} ended without being stopped; the next sync compares every file")
            place.crashed.touch()
        if record is None or not place.disk.is_file():
            if record is not None and record.started:
                progress.say(f"machine {place.name}: its disk {place.disk} is lost; it starts afresh")
            record = overlay.make(place, record.snapshot if record else CLEAN, record)
        else:
            overlay.require_image(place, record)
        return start.boot(place, record, die_with_us=die_with_us)


def _use_running(place: Place, record: MachineRecord) -> ssh.Target:
    """Wait for a machine that already runs; it may still be booting."""
    place.resume_if_full()
    target = start.wait(place, record)
    progress.say(f"machine {place.name} is running (pid {record.pid}, port {record.ssh_port})")
    config = place.config
    has = {"memory": show_size(record.memory), "cpus": record.cpus, "network": record.network}
    asked = {"memory": show_size(config.memory), "cpus": config.cpus, "network": config.network}
    for key, value in has.items():
        if value != asked[key]:
            kept = f"machine {place.name} keeps {key} {value} until it is stopped and started"
            progress.say(f"{kept}; {asked[key]} was requested")
    return target


def stop(place: Place, *, gentle: bool = True, timeout_s: float | None = None) -> str:
    """Stop the machine, gently first; returns the rung of the ladder that was needed.

    `timeout_s`: how long each gentle rung may take. Newer files in copied binds are copied back first; failures are
    reported. Not `gentle`: ends another command that holds the machine's lock. Without a readable record, stops
    whatever process of the machine is found.
    """
    with _exclusive(place, force=not gentle) as cut:
        record, fault = place.state.machine(place.name), place.fault()
        if record is None and not fault:
            if cut:  # the command that held the lock has removed it
                return cut
            raise StateError(f"there is no machine {place.name}", hint=place.command("start"))
        if fault:
            _say_fault(place, fault)
        if gentle and record is not None and place.pid(record) is not None:
            gentle = ladder.resume_if_paused(place)
            if gentle and record.ready:
                binds.copy_out(place, record, last=record.throwaway)
        rung = ladder.stop(place, record, gentle=gentle, timeout_s=timeout_s)
        return cut if rung == ladder.AT_REST and cut else rung


def restore(place: Place, snapshot: str = "") -> ImageRecord:
    """Discard the machine's writes and go back to `snapshot`, by default the one it was made from."""
    with place.lock():
        record = require_same_guest(place)
        name = snapshot or (record.snapshot if record else CLEAN)
        image = overlay.find_image(place, name)
        if record is not None:
            ladder.stop(place, record, gentle=False)
        overlay.make(place, name, record)
        return image


def snapshot(place: Place, name: str) -> ImageRecord:
    """Save the stopped machine's disk as a standalone snapshot, without a backing file."""
    with place.lock():
        if place.state.snapshot_record(name) == place.state.clean_record:
            raise StateError("'clean' is the image that the phases end in; save the machine under another name")
        record = require_same_guest(place)
        if record is None or not place.disk.is_file():
            raise StateError(f"machine {place.name} has no disk to save", hint=place.command("start"))
        if place.pid(record) is not None:
            raise StateError(f"machine {place.name} is running: its disk is in use", hint=place.command("stop"))
        return overlay.save(place, record, name)


def update_record(place: Place, **values: Any) -> ssh.Target:
    """Update the running machine's record and its ssh configuration; returns the new target."""
    with place.lock():
        record = require_same_guest(place)
        if record is None or place.pid(record) is None:
            raise StateError(f"machine {place.name} is not running", hint=place.command("start"))
        ssh.close(place.target(record))
        target = place.target(place.write(msgspec.structs.replace(record, **values)))
        ssh.write_config(target)
        return target


def renew(place: Place, lease_s: float) -> None:
    """Record the end of the machine's lease: `lease_s` from now; 0: never. StateError if there is no machine."""
    with place.lock():
        record = place.record()
        if record is None:
            raise StateError(f"there is no machine {place.name}", hint=place.command("start"))
        until = round(time.time() + lease_s, 1) if lease_s else 0.0
        place.write(msgspec.structs.replace(record, lease_until=until))


# -- by hand


def prepare_install(place: Place, user: str) -> None:
    """Give the machine an empty disk to install on by hand; later logins are as `user`."""
    with place.lock():
        record = require_same_guest(place)
        if record is not None:
            ladder.stop(place, record)
        place.make_folder()
        for old in (place.disk, place.folder / "ready", place.crashed):
            old.unlink(missing_ok=True)
        place.write(
            MachineRecord(
                name=place.name,
                guest=place.config.label,
                snapshot=MANUAL,
                image="",
                image_sha256="",
                ssh_user=user,
                host_keys=[],
                mac=identity.mac(place.folder),
                changed=secrets.token_hex(8),
            )
        )
        disk.create(place.disk, place.config.disk_size)


def boot_on_terminal(place: Place, cds: Sequence[Path], *, boot: str, display: str) -> int:
    """Boot the machine from `boot`, cd or disk, with its console on our terminal; returns QEMU's status.

    No deadline, because a user is present. StateError if the machine was not installed by hand.
    """
    with place.lock():
        record = require_same_guest(place)
        if record is None or record.image or not place.disk.is_file():
            raise StateError(f"machine {place.name} was not installed by hand", hint="doit install")
        ladder.stop(place, record)
        # The user at the console may generate host keys; the next start records them.
        record = place.write(msgspec.structs.replace(record, pid=0, pid_started="", host_keys=[]))
        return start.on_terminal(place, record, display, cds=tuple(cds), boot=boot)


# -- its end


def destroy(place: Place, *, force: bool = False, report: bool = True) -> list[Path]:
    """Stop the machine and remove all its files; returns them.

    Cuts its power, because its disk is discarded. Newer files in copied binds are copied back first; failures are
    reported. `force`: ends another command that holds the machine's lock. MachineError, and nothing is removed, if a
    process of it is not ours. `report`: report how it was stopped.
    """
    if not place.folder.exists():
        return []
    with _exclusive(place, force=force):
        return remove(place, wait_s=takeover.RELEASE_S if force else binds.COPY_S, report=report)


def remove(place: Place, *, wait_s: float = 0.0, report: bool = False) -> list[Path]:
    """destroy(), for the holder of the machine's lock. `wait_s`: how long to wait for others that copy binds."""
    if not place.folder.exists():  # another process was first
        return []
    record = place.state.machine(place.name)
    if record is None and (fault := place.fault()):
        _say_fault(place, fault)
    observer = progress.observer() if report else progress.Observer()
    try:
        # The binds of this process's own machine were not copied back yet, even if it ended by itself.
        there = record is not None and (record.owner == os.getpid() or place.pid(record) is not None)
        if record is not None and record.ready and record.binds and there:
            with progress.observing(observer):
                answers = ladder.resume_if_paused(place)
            if answers:
                binds.copy_out(place, record, last=True, wait_s=wait_s)
    finally:  # an interrupt of the copy still removes the machine
        with progress.observing(observer):
            gone = _cut_and_remove(place, record)
    return gone


def _cut_and_remove(place: Place, record: MachineRecord | None) -> list[Path]:
    """Cut the machine's power, and remove its files."""
    ladder.stop(place, record, gentle=False)
    gone = sorted(place.folder.iterdir())
    shutil.rmtree(place.sockets, ignore_errors=True)
    # The record is removed last: after a kill, a half-removed machine can still be listed and removed.
    for path in sorted(gone, key=lambda path: path.name == "machine.toml"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    place.folder.rmdir()
    return gone


@contextlib.contextmanager
def _exclusive(place: Place, *, force: bool) -> Iterator[str]:
    """Hold the machine's lock. Yields the rung that stopped the machine, if taking the lock needed that."""
    with contextlib.ExitStack() as stack:
        if force:
            cut = stack.enter_context(takeover.lock(place))
        else:
            cut = ""
            stack.enter_context(place.lock())
        try:
            yield cut
        finally:
            if not place.folder.exists():
                drop(place.lock_file)


def _say_fault(place: Place, fault: str) -> None:
    """Report what cannot be done without the record."""
    progress.say(
        f"machine {place.name}: its record cannot be read: {fault}; its process is searched for, and nothing is "
        "copied back from its binds"
    )
    number, found = place.pidfile_pid(), place.process()
    if number and processes.started(number) and (found is None or found.number != number):
        progress.say(f"machine {place.name}: process {number} in its pid file cannot be proved to be its QEMU")
