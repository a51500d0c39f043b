"""Host folders in a machine: mounted by 9p if the guest's kernel has it, else copied by rsync, with a message.

A bind is copied to the guest when the machine starts and before each command; newer files are copied back after it.
Nothing is deleted on either side. A read-only copy is bind-mounted read-only. A folder with excluded or private parts
is always copied, because 9p exposes all of it.

A failure to copy back is reported. It changes no command's status and does not keep a machine from stopping.
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
ROOM_HINT = "leave out files with --exclude PATTERN, or give it a larger --disk"
STAGE = "/var/lib/vmtasks/binds"
"""The folder for copies of read-only binds in the guest, owned by root."""

ALL_BACK = "all newer files in the guest were copied back"
NOT_BACK = "newer files in the guest could not be copied back"
PART_BACK = "some newer files in the guest could not be copied back; the others were"

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
    """Resolve the host's path of a bind. ConfigError, naming it, for a folder that cannot be bound."""
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
    """Record for each bind why it must be copied, or ''. Call before QEMU starts."""
    return msgspec.structs.replace(
        record, binds=[msgspec.structs.replace(bind, copied=_why_copied(place, bind)) for bind in record.binds]
    )


def _why_copied(place: Place, bind: BindRecord) -> str:
    hidden = _filter(place, bind).hidden
    if hidden:
        return f"{os.fsdecode(hidden[0]).rstrip('/')} in it never goes into a guest"
    return "parts of it are excluded" if bind.exclude else ""


def _filter(place: Place, bind: BindRecord) -> Filter:
    """The bind's excluded paths, and the size of the rest, as of now."""
    walk = Walk(Path(bind.host), bind.exclude, hidden=Private(place.config))
    size = sum(allocated_bytes(info) for _, info in walk)
    return Filter(walk.hidden, bind.exclude, size=size)


def mount(place: Place, connection: "Connection", record: MachineRecord) -> MachineRecord:
    """Mount or copy each bind in the guest; returns the record with `how` set for each.

    BindError when one fails, SshError when the guest is not reached.
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
    """Mount a bind by 9p; returns why it is unusable, or ''. The login user must be able to write a writable bind."""
    mode = "ro" if bind.read_only else "rw"
    user = connection.target.user
    _check_done(_execute_as_root(connection, MOUNT, guest=bind.guest, tag=f"bind{number}", mode=mode), bind)
    if bind.read_only:
        return ""
    if not _unwritable(connection, bind):
        return ""
    _check_done(_execute_as_root(connection, UMOUNT, guest=bind.guest, who=user), bind)
    return f"{user} may not write there by 9p, which keeps the host's user ids"


def _first_copy(place: Place, connection: "Connection", number: int, bind: BindRecord) -> None:
    """Copy a bind to a guest that has just started. If an earlier copy succeeded, a failure is only a warning."""
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
            hint = "fix the named file, or choose another folder or another path of the guest"
            raise BindError(
                f"{option_text(bind)}: not everything could be copied to the guest: {error.message}",
                hint=ROOM_HINT if isinstance(error, NoRoomError) else hint,
            ) from None
        progress.say(
            f"warning: machine {place.name}: {option_text(bind)}: not everything is up to date there: {error.message}"
        )


def _unwritable(connection: "Connection", bind: BindRecord) -> str:
    """Why the login user cannot write there, or ''."""
    done = connection.execute(WRITE_TEST, cwd="/", env={"guest": bind.guest}, timeout_s=MOUNT_S)
    said = done.stderr.decode(errors="replace")
    return "" if done.status == 0 else said.strip().rpartition(": ")[2] or f"status {done.status}"


def copy_in(place: Place, record: MachineRecord) -> bool:
    """Update the copied binds in the guest. False if it is not reached: the next connection reports why.

    BindError if some files could not be copied, or the guest is paused: no command may run on outdated files.
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
                    f"machine {place.name}: {option_text(bind)}: not everything is up to date there: {error.message}",
                    hint=f"to log in without copying: {place.ssh_line()}",
                ) from None
    return True


def copy_out(place: Place, record: MachineRecord, *, last: bool = False, wait_s: float = COPY_S) -> None:
    """Copy newer files back from the guest, and report failures. Links that lead out of the folder stay there.

    `last`: the machine is removed afterwards. `wait_s`: how long to wait for another command's copy.
    """
    back = [bind for bind in record.binds if bind.how == "rsync" and not bind.read_only]
    left = list(back)
    try:
        with signals.cuttable(), _copy_lock(place, record, wait_s):
            for number, bind in enumerate(back):
                left = back[number:]
                try:
                    copy(place.target(record), f"{bind.guest}/", f"{bind.host}/", _filter(place, bind), back=True)
                except SshError as error:  # the other binds would fail too
                    _warn(place, left, f"{NOT_BACK}: {error.message}", last=last)
                    return
                except VmTasksError as error:
                    partial = isinstance(error, CommandError) and error.status == PARTIAL
                    _warn(place, [bind], f"{PART_BACK if partial else NOT_BACK}: {error.message}", last=last)
    except (StateError, OSError) as error:  # the lock is taken, or this host's disk is full
        _warn(place, left, f"{NOT_BACK}: {error}", last=last)
    except KeyboardInterrupt:
        _warn(place, left, f"interrupted before {ALL_BACK}", last=last)
        raise


def _warn(place: Place, binds: Sequence[BindRecord], what: str, *, last: bool) -> None:
    fate = "they are lost with the machine" if last else "they stay in the guest, and the next command tries again"
    which = ", ".join(option_text(bind) for bind in binds)
    progress.say(f"warning: machine {place.name}: {which}: {what}; {fate}")


def option_text(bind: BindRecord) -> str:
    """The bind as a command-line option."""
    return f"--bind {Bind(bind.host, bind.guest, bind.read_only)}"


def push(place: Place, target: ssh.Target, number: int, bind: BindRecord) -> None:
    """Copy newer files from the host to the guest."""
    into = f"{STAGE}/{number}" if bind.read_only else bind.guest
    copy(target, f"{bind.host}/", f"{into}/", _filter(place, bind), as_root=bind.read_only)


def _warn_if_exposed(place: Place, bind: BindRecord) -> None:
    """Warn if a mounted folder now has private parts: only the start of the machine checks that otherwise."""
    why = _why_copied(place, bind)
    if why:
        progress.say(
            f"warning: machine {place.name}: {option_text(bind)}: {why}, but the guest can read it, as it was added "
            f"after the machine started; stop and start the machine, or move it elsewhere"
        )


def _copy_lock(
    place: Place, record: MachineRecord, wait_s: float = COPY_S
) -> contextlib.AbstractContextManager[object]:
    """Serialize copies: sessions may start and end at the same time."""
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
        raise BindError(f"{option_text(bind)}: could not be set up: {said}", hint="choose another path of the guest")
