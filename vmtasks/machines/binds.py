"""Folders of this host in a machine: mounted by 9p where the guest's kernel has it, else copied by rsync, and said so.

A copy goes to the guest when the machine starts and before each command, and what is newer in the guest comes back
after it; nothing is deleted on either side. A copy that is read-only is mounted so, on top of itself. A folder of which
not all may be in the guest is always copied: by 9p the guest has all of it.

What cannot be copied back is said, and keeps no command from its status and no machine from its end.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmtasks.config.arguments import Bind
from vmtasks.errors import BindError, CommandError, ConfigError, SshError, StateError, VmTasksError
from vmtasks.guest import connect, ssh
from vmtasks.guest.sync import PARTIAL, Filter, NoRoomError, allocated_bytes, copy
from vmtasks.guest.tree import Walk
from vmtasks.host import progress, signals
from vmtasks.host.locks import lock
from vmtasks.images.private import Private
from vmtasks.images.workspace import BindRecord, MachineRecord
from vmtasks.machines.folder import Place
from vmtasks.qemu import qmp

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection
    from vmtasks.guest.command import CommandResult

COPY_S = 3600.0
MOUNT_S = 60.0
ROOM_HINT = "leave out what is not needed there with --exclude PATTERN, or give it a larger --disk"
STAGE = "/var/lib/vmtasks/binds"
"""Where the copy of a read-only bind stands in the guest; root's alone."""

ALL_BACK = "all that is newer in the guest was copied back"
NOT_BACK = "what is newer in the guest could not be copied back"
PART_BACK = "not all that is newer in the guest could be copied back; the rest was"

PROBE = "modprobe 9pnet_virtio 2>/dev/null; modprobe 9p 2>/dev/null; grep -qw 9p /proc/filesystems"
MOUNT = r"""
grep -q " $guest 9p " /proc/mounts && exit 0
mkdir -p "$guest" && mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$mode" "$tag" "$guest"
"""
WRITE_TEST = 'new=$guest/.vmtasks-$$; : >"$new" && rm "$new"'
UMOUNT = r"""
umount "$guest" && { [ -n "$(ls -A "$guest")" ] || chown "$who" "$guest"; }
"""
FOLDER = r"""
[ -d "$guest" ] || { mkdir -p "$guest" && chown "$who" "$guest"; }
"""
READ_ONLY = r"""
mkdir -p "$guest" "$stage" && chmod 755 "$stage" || exit
grep -q " $guest " /proc/mounts && exit 0
mount -o bind "$stage" "$guest" && mount -o remount,bind,ro "$guest"
"""


def check(bind: Bind, private: Private) -> BindRecord:
    """The bind with its folder's whole path. ConfigError, naming the host's side, for a folder that cannot be bound."""
    try:
        folder = Path(bind.host).expanduser().resolve()
    except RuntimeError:
        folder = Path(bind.host)
    where = f"--bind {bind.host}:{bind.guest}: the host's side, {bind.host!r},"
    if not folder.exists():
        raise ConfigError(f"{where} does not exist")
    if not folder.is_dir():
        raise ConfigError(f"{where} is not a folder")
    mode = os.R_OK | os.X_OK | (0 if bind.read_only else os.W_OK)
    if not os.access(folder, mode):
        raise ConfigError(f"{where} may not be {'read' if bind.read_only else 'written to'} by you; use :ro or another")
    place = private.around(folder)
    if place is not None:
        raise ConfigError(
            f"{where} is in {place}, where vmtasks keeps disks and keys, and never goes into a guest; use another"
        )
    return BindRecord(host=str(folder), guest=bind.guest, read_only=bind.read_only, exclude=list(bind.exclude))


def decide_copied(place: Place, record: MachineRecord) -> MachineRecord:
    """The record with the reason why each bind must be copied, if there is one. To be asked before QEMU is started."""
    return msgspec.structs.replace(
        record, binds=[msgspec.structs.replace(bind, copied=_why_copied(place, bind)) for bind in record.binds]
    )


def _why_copied(place: Place, bind: BindRecord) -> str:
    hidden = _filter(place, bind).hidden
    if hidden:
        return f"{os.fsdecode(hidden[0]).rstrip('/')} in it never goes into a guest"
    return "not all of it is wanted there" if bind.exclude else ""


def _filter(place: Place, bind: BindRecord) -> Filter:
    """What of the bind is not copied, and what the rest takes, as it is now."""
    walk = Walk(Path(bind.host), bind.exclude, hidden=Private(place.config))
    size = sum(allocated_bytes(info) for _, info in walk)
    return Filter(walk.hidden, bind.exclude, size=size)


def mount(place: Place, connection: "Connection", record: MachineRecord) -> MachineRecord:
    """Have each bind in the guest; returns the record, which says how each is.

    BindError when one cannot be had, SshError when the guest is not reached.
    """
    if not record.binds:
        return record
    shared = any(not bind.copied for bind in record.binds)
    has_9p = shared and _execute_as_root(connection, PROBE).status == 0
    done = []
    for number, bind in enumerate(record.binds):
        why = bind.copied or ("its kernel has no 9p" if not has_9p else _mount(connection, number, bind))
        if why:
            _make_mount_point(connection, number, bind)
            _first_copy(place, connection, number, bind)
            if bind.how != "rsync":
                progress.say(f"machine {place.name}: {why}, so {bind.host} is copied to {bind.guest}")
        done.append(msgspec.structs.replace(bind, how="rsync" if why else "9p"))
    return place.write(msgspec.structs.replace(record, binds=done))


def _mount(connection: "Connection", number: int, bind: BindRecord) -> str:
    """Mount it by 9p; returns why it is of no use so. The login user must be able to write where that is meant."""
    mode = "ro" if bind.read_only else "rw"
    user = connection.target.user
    _check_done(_execute_as_root(connection, MOUNT, guest=bind.guest, tag=f"bind{number}", mode=mode), bind)
    if bind.read_only:
        return ""
    if not _unwritable(connection, bind):
        return ""
    _check_done(_execute_as_root(connection, UMOUNT, guest=bind.guest, who=user), bind)
    return f"{user} may not write there by 9p, which keeps the numbers of users"


def _first_copy(place: Place, connection: "Connection", number: int, bind: BindRecord) -> None:
    """Copy it to a guest that has come up. Where that has worked before, a failure must not keep the disk from us."""
    target, new = connection.target, bind.how != "rsync"
    if new and not bind.read_only and (why := _unwritable(connection, bind)):
        other = "" if target.user == "root" else ", or --user root"
        raise BindError(
            f"{option_text(bind)}: {target.user} cannot write to {bind.guest} in the guest: {why}",
            hint=f"choose another path of the guest{other}",
        )
    try:
        push(place, target, number, bind)
    except CommandError as error:
        if new:
            hint = "mend what is named, or choose another folder or another path of the guest"
            raise BindError(
                f"{option_text(bind)}: cannot all be copied to the guest: {error.message}",
                hint=ROOM_HINT if isinstance(error, NoRoomError) else hint,
            ) from None
        progress.say(
            f"warning: machine {place.name}: {option_text(bind)}: not all is up to date there: {error.message}"
        )


def _unwritable(connection: "Connection", bind: BindRecord) -> str:
    """Why the login user cannot write there; empty when it can."""
    done = connection.execute(WRITE_TEST, cwd="/", env={"guest": bind.guest}, timeout_s=MOUNT_S)
    said = done.stderr.decode(errors="replace")
    return "" if done.status == 0 else said.strip().rpartition(": ")[2] or f"status {done.status}"


def copy_in(place: Place, record: MachineRecord) -> bool:
    """Bring what is copied up to date in the guest. False when it is not reached: who goes there next will say why.

    BindError when not all could be copied, or the guest stands still: nothing must run on what is out of date.
    """
    target = place.target(record)
    copied = [bind for bind in record.binds if bind.how == "rsync"]
    if copied and (state := place.stuck_state()):
        raise BindError(
            f"machine {place.name}: {option_text(copied[0])} cannot be brought up to date there: {qmp.STUCK[state]}",
            hint=place.remedy(state),
        )
    with _copy_lock(place, record):
        for number, bind in enumerate(record.binds):
            if bind.how != "rsync":
                _warn_if_exposed(place, bind)
                continue
            try:
                push(place, target, number, bind)
            except (CommandError, SshError) as error:
                if isinstance(error, SshError) and not connect.is_ready(target):
                    return False
                raise BindError(
                    f"machine {place.name}: {option_text(bind)}: not all is up to date there: {error.message}",
                    hint=f"to log in without copying: {place.ssh_line()}",
                ) from None
    return True


def copy_out(place: Place, record: MachineRecord, *, last: bool = False, wait_s: float = COPY_S) -> None:
    """Bring back what is newer in the guest, and say what could not be. Links that lead out of the folder stay there.

    `last`: the machine goes after this. `wait_s`: how long another command's copying may keep us from ours.
    """
    back = [bind for bind in record.binds if bind.how == "rsync" and not bind.read_only]
    left = list(back)
    try:
        with signals.cuttable(), _copy_lock(place, record, wait_s):
            for number, bind in enumerate(back):
                left = back[number:]
                try:
                    copy(place.target(record), f"{bind.guest}/", f"{bind.host}/", _filter(place, bind), back=True)
                except SshError as error:  # nor would the others be reached
                    _warn(place, left, f"{NOT_BACK}: {error.message}", last=last)
                    return
                except VmTasksError as error:
                    partial = isinstance(error, CommandError) and error.status == PARTIAL
                    _warn(place, [bind], f"{PART_BACK if partial else NOT_BACK}: {error.message}", last=last)
    except (StateError, OSError) as error:  # the lock cannot be had, or this host's disk is full
        _warn(place, left, f"{NOT_BACK}: {error}", last=last)
    except KeyboardInterrupt:
        _warn(place, left, f"interrupted before {ALL_BACK}", last=last)
        raise


def _warn(place: Place, binds: Sequence[BindRecord], what: str, *, last: bool) -> None:
    fate = "it goes with the machine" if last else "it stays in the guest, and the next command tries again"
    which = ", ".join(option_text(bind) for bind in binds)
    progress.say(f"warning: machine {place.name}: {which}: {what}; {fate}")


def option_text(bind: BindRecord) -> str:
    """The bind as a user writes it."""
    return f"--bind {Bind(bind.host, bind.guest, bind.read_only)}"


def push(place: Place, target: ssh.Target, number: int, bind: BindRecord) -> None:
    """Copy what is newer on the host."""
    into = f"{STAGE}/{number}" if bind.read_only else bind.guest
    copy(target, f"{bind.host}/", f"{into}/", _filter(place, bind), as_root=bind.read_only)


def _warn_if_exposed(place: Place, bind: BindRecord) -> None:
    """Warn of what was put into a folder that the guest has all of: that was looked at when the machine started."""
    why = _why_copied(place, bind)
    if why:
        progress.say(
            f"warning: machine {place.name}: {option_text(bind)}: {why}, and the guest can read it, as it came there "
            f"since the machine was started; stop and start the machine, or put it elsewhere"
        )


def _copy_lock(
    place: Place, record: MachineRecord, wait_s: float = COPY_S
) -> contextlib.AbstractContextManager[object]:
    """One copy at a time: sessions may begin and end together."""
    if not any(bind.how == "rsync" for bind in record.binds):
        return contextlib.nullcontext()
    what = f"the binds of machine {place.name}"
    return lock(
        place.folder / "binds.lock",
        what,
        timeout_s=wait_s,
        waiting=lambda holder: progress.say(f"{what}: {holder} is copying; waiting"),
    )


def _make_mount_point(connection: "Connection", number: int, bind: BindRecord) -> None:
    if bind.read_only:
        done = _execute_as_root(connection, READ_ONLY, guest=bind.guest, stage=f"{STAGE}/{number}")
    else:
        done = _execute_as_root(connection, FOLDER, guest=bind.guest, who=connection.target.user)
    _check_done(done, bind)


def _execute_as_root(connection: "Connection", text: str, **env: str) -> "CommandResult":
    return connection.execute(text, cwd="/", env=env, user="root", timeout_s=MOUNT_S)


def _check_done(done: "CommandResult", bind: BindRecord) -> None:
    if done.status != 0:
        lines = done.stderr.decode(errors="replace").split("\n")
        said = "; ".join(lines).strip("; ") or f"status {done.status}"
        raise BindError(f"{option_text(bind)}: cannot be had there: {said}", hint="choose another path of the guest")
