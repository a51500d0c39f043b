"""A machine's identity apart from its image: MAC address, host name, SSH host keys.

The first contact is checked strictly against the image's host keys. The machine's own keys are generated here and
installed over that connection. From then on no other machine on its port can pass for it.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmtasks.errors import SshError
from vmtasks.guest import connect, keypair, ssh
from vmtasks.host import files, progress
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import keys
from vmtasks.machines.folder import Place

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection

INSTALL_S = 60.0
RELOAD_S = 20.0
TRY_S = 15.0
NOT_THERE = 66
KINDS = {
    "ssh-ed25519": ("ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa", "-b", "256"),
    "ecdsa-sha2-nistp384": ("ecdsa", "-b", "384"),
    "ecdsa-sha2-nistp521": ("ecdsa", "-b", "521"),
    "ssh-rsa": ("rsa",),
}
"""ssh-keygen's arguments for each type of host key; its file in the guest is `ssh_host_KIND_key`."""

HOSTNAME = r"""
hostname "$name" || exit
swap() {
    cp -p "$1" "$1.vmtasks" && cat >"$1.vmtasks" && mv "$1.vmtasks" "$1"
}
if [ -f "$etc/hostname" ]; then
    printf '%s\n' "$name" | swap "$etc/hostname" || exit
fi
if [ -f "$etc/rc.conf" ]; then
    { grep -v '^hostname=' "$etc/rc.conf"; printf 'hostname="%s"\n' "$name"; } | swap "$etc/rc.conf" || exit
fi
if grep -q '^127\.0\.1\.1[[:space:]]' "$etc/hosts" 2>/dev/null; then
    sed "s/^127\.0\.1\.1[[:space:]].*/127.0.1.1 $name/" "$etc/hosts" | swap "$etc/hosts" || exit
fi
"""
"""Sets the host name $name, now and in the files that Linux (Debian and others) and the BSDs read at boot."""

INSTALL = r"""
umask 077
while read -r kind && [ "$kind" != end ]; do
    file=$folder/ssh_host_${kind}_key
    if [ ! -f "$file" ]; then
        echo "there is no $file" >&2
        for file do rm -f "$file.vmtasks" "$file.pub.vmtasks"; done
        exit 66
    fi
    while IFS= read -r line && [ -n "$line" ]; do
        printf '%s\n' "$line"
    done >"$file.vmtasks" || exit
    read -r public && printf '%s\n' "$public" >"$file.pub.vmtasks" && chmod 644 "$file.pub.vmtasks" || exit
    set -- "$@" "$file"
done
[ "$kind" = end ] || exit
for file do
    mv "$file.pub.vmtasks" "$file.pub" && mv "$file.vmtasks" "$file" || exit
done
sync
"""
"""Replaces host keys by those of the same kinds from stdin. Changes nothing if one of the old files is missing."""

RELOAD = r"""
for file in /run/sshd.pid /var/run/sshd.pid; do
    if [ -s "$file" ]; then
        kill -HUP "$(cat "$file")"
        exit
    fi
done
"""
"""OpenSSH re-executes itself; sessions continue. Without a pid file, each connection starts its own server."""


def mac(folder: Path) -> str:
    """The MAC address of the machine in this folder: locally administered, unicast, derived from the path."""
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()
    return ":".join(["02", *(digest[at : at + 2] for at in range(0, 10, 2))])


def hostname(name: str) -> str:
    """The host name for a machine's name: characters that RFC 1123 does not allow become hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:63].rstrip("-")


def shows_image_keys(record: MachineRecord) -> bool:
    """Whether a machine that has just started shows its image's host keys. One installed by hand never does."""
    return bool(record.image) and not record.ready and record.identity in ("image", "changing")


def personalize(place: Place, record: MachineRecord, connection: "Connection") -> "tuple[MachineRecord, Connection]":
    """Install a machine's own login key, host name and host keys where they are missing.

    Returns the new record, and the connection that proved it: a new one, unless nothing was missing.

    Can be repeated after a kill at any moment: until the new keys are proved, the old ones stay in the record, so that
    the next command logs in, as strictly. A guest that cannot change its host keys keeps those of its image, with a
    message. SshError when login fails afterwards.
    """
    login, host = bool(record.image) and record.key != "own", shows_image_keys(record)
    if host and record.identity == "changing":
        record, host = _resume(place, record)
    if not login and not host:
        return record, connection
    if login and not place.own_key.is_file():
        keypair.make_pair(place.own_key, f"vmtasks {place.name}")
    old = record.host_keys
    fresh = make_host_keys(place, old) if host and place.config.guest.ssh.host_keys else []
    changing = {"key": "changing"} if login else {}
    changing |= {"identity": "changing"} if host else {}
    record = place.write(msgspec.structs.replace(record, **changing, host_keys=[*(key.public for key in fresh), *old]))
    ssh.write_config(place.target(record))
    own = record
    if login:
        keys.install_own_key(place, record, connection)
        own = msgspec.structs.replace(own, key="own", ssh_user=record.login or record.ssh_user)
    if host:
        own = _install_identity(place, connection, own, fresh, old)
    ssh.stop_sharing(place.target(record))
    return _verify_login(place, own, fallback=record.host_keys)


def _resume(place: Place, record: MachineRecord) -> tuple[MachineRecord, bool]:
    """After a kill: whether the guest still needs host keys, or already shows the ones installed last."""
    newest = record.host_keys[: len(key_kinds(record.host_keys))]
    done = msgspec.structs.replace(record, host_keys=newest)
    ssh.stop_sharing(place.target(record))
    proof = _log_in(place, done, 0)
    if proof is None:
        return record, True
    proof.close()
    return place.write(msgspec.structs.replace(done, identity="own")), False


@dataclass(frozen=True)
class HostKey:
    """A new host key: `kind` as in its file name, `public` as `type key`."""

    kind: str
    private: str
    public: str

    def __str__(self) -> str:
        """The format that INSTALL reads."""
        return f"{self.kind}\n{self.private}\n{self.public}\n"


def key_kinds(host_keys: Sequence[str]) -> list[tuple[str, ...]]:
    """ssh-keygen's arguments for keys of the same types, each once."""
    return sorted({KINDS[key.split()[0]] for key in host_keys if key.split()[0] in KINDS})


def make_host_keys(place: Place, old: list[str]) -> list[HostKey]:
    """Generate host keys of the same types, in a private folder that is removed afterwards."""
    made = []
    with tempfile.TemporaryDirectory(dir=place.sockets) as folder:
        for kind, *how in key_kinds(old):
            path = Path(folder, kind)
            keypair.make_pair(path, place.name, (kind, *how))
            public = files.read_text(keypair.public_half(path)).split()
            made.append(HostKey(kind, files.read_text(path), " ".join(public[:2])))
    return made


def install_input(fresh: Sequence[HostKey]) -> str:
    """The stdin of INSTALL; without its last line INSTALL changes nothing."""
    return "".join([*map(str, fresh), "end\n"])


def _install_identity(
    place: Place, connection: "Connection", own: MachineRecord, fresh: list[HostKey], old: list[str]
) -> MachineRecord:
    """Set the guest's host name and host keys; returns `own` updated with the result."""
    guest = place.config.guest
    where = guest.ssh.host_keys if fresh else ""
    env = {"name": hostname(place.name), "etc": "/etc", "folder": where}
    parts = [f"(\n{guest.hostname or HOSTNAME}\n) </dev/null || exit"]
    parts += [INSTALL, guest.ssh.reload or RELOAD] if where else []
    given = install_input(fresh).encode() if where else b""
    done = connection.execute("\n".join(parts), cwd="/", env=env, user="root", stdin=given, timeout_s=INSTALL_S)
    if done.status == 0 and where:
        return msgspec.structs.replace(own, identity="own", host_keys=[key.public for key in fresh])
    why = done.stderr.decode(errors="replace").strip() or (
        f"status {done.status}" if done.status else "guest.toml names no folder for others"
    )
    if done.status in (0, NOT_THERE, keys.CANNOT_BECOME):  # nothing was changed
        progress.say(f"machine {place.name} keeps the SSH host keys of its image: {why}")
        return msgspec.structs.replace(own, identity="shared", host_keys=old)
    progress.say(f"machine {place.name} got no SSH host keys of its own; the next command tries again: {why}")
    return own


def _verify_login(place: Place, own: MachineRecord, fallback: list[str]) -> "tuple[MachineRecord, Connection]":
    """Record the keys that a new connection has proved: the machine's own host keys and login key, and no others.

    A server that keeps its old host keys reads the new ones when the guest boots; until then both are accepted.
    """
    if (proof := _log_in(place, own, RELOAD_S)) is not None:
        return place.write(own), proof
    both = msgspec.structs.replace(own, identity="changing", host_keys=fallback)
    proof = _log_in(place, both, 0) if own.identity == "own" else None
    if proof is None:
        raise SshError(
            f"machine {place.name} does not accept a login with its new keys", hint=f"vmtasks doctor {place.name}"
        )
    progress.say(
        f"machine {place.name} shows SSH host keys of its own from its next boot on: its server does not reload them"
    )
    return place.write(both), proof


def _log_in(place: Place, record: MachineRecord, within_s: float) -> "Connection | None":
    """Log in again by this record; None if that fails. Tries at least once."""
    target = place.target(record)
    ssh.write_config(target)
    ssh.stop_sharing(target)
    until = time.monotonic() + within_s
    while True:
        with contextlib.suppress(SshError):
            return connect.connect(target, timeout_s=TRY_S)
        if time.monotonic() > until:
            return None
        time.sleep(0.1)
