"""The keys that a machine authorizes: its own, which replaces its image's, and public keys of users.

The guest's `authorized_keys` are written to a temporary file and renamed, so that a kill at any moment locks no user
out. Open sessions stay open: a server reads these files only at login.
"""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmtasks.config import arguments
from vmtasks.config.arguments import PublicKey
from vmtasks.errors import ConfigError, SshError, StateError
from vmtasks.guest import connect, ssh
from vmtasks.guest.keypair import make_pair, public_half, read_public
from vmtasks.host import files, process
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines.folder import Place

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection

NO_SUCH_USER = 67
CANNOT_BECOME = 126
CHANGE_S = 60.0
LINE = "\n"

CHANGE = r"""
change() {
    new=$1.vmtasks
    cp -p "$1" "$new" || return
    { grep -v -F -e "$drop" "$1" || :; [ -z "$put" ] || printf '%s\n' "$put"; } >"$new" && mv "$new" "$1"
}
all=$drop
[ -z "$put" ] || drop="$drop
$put"
found=
while IFS=: read -r name _ _ _ _ home _; do
    file=$home/.ssh/authorized_keys
    if [ "$name" = "$who" ]; then
        found=1
        if [ ! -f "$file" ]; then
            mkdir -p "$home/.ssh" && chmod 700 "$home/.ssh" && : >"$file" && chmod 600 "$file" || exit
            [ "$(id -u)" != 0 ] || chown -R "$who" "$home/.ssh" || exit
        fi
        change "$file" || exit
    elif [ -n "$everywhere" ] && grep -q -F -e "$all" "$file" 2>/dev/null; then
        change "$file" || exit
    fi
done </etc/passwd
[ -n "$found" ] || exit 67
sync
"""
"""Removes the lines with any of $drop from $who's file and adds the lines of $put; with $everywhere also in
the files of other users that have a line of $drop."""


READ = r"""
while IFS=: read -r name _ _ _ _ home _; do
    [ "$name" != "$who" ] || cat "$home/.ssh/authorized_keys"
done </etc/passwd
"""


@dataclass(frozen=True)
class AuthorizedKey:
    """An authorized key. `is_own`: the machine's own, which vmtasks needs to log in."""

    key: PublicKey
    is_own: bool


def require_usable(private: Path, public: Path | None = None, remedy: str = "put it back from a copy") -> None:
    """StateError, with the reason and the remedy, if ssh cannot use this private key.

    `public`: the public key that guests authorize; a private key that does not match it is an error too.
    """
    what = f"the private key {private}"
    if not private.is_file():
        how = "is no file" if private.exists() or private.is_symlink() else "does not exist"
        raise StateError(f"{what} {how}", hint=remedy)
    stat = private.stat()
    if stat.st_uid == os.getuid() and stat.st_mode & 0o077:
        raise StateError(
            f"{what} can be read by other users (its mode is {stat.st_mode & 0o777:o}): ssh refuses such a key",
            hint=f"chmod 600 {shlex.quote(str(private))}",
        )
    shown = process.run(["ssh-keygen", "-y", "-P", "", "-f", private], timeout_s=30, check=False)
    authorized = (
        arguments.public_key(files.read_text(public, "replace").strip()) if public and public.is_file() else None
    )
    derived = arguments.public_key(shown.stdout.strip())
    if shown.status != 0 and "incorrect passphrase" in shown.stderr:
        half = public_half(private)
        agent = process.run(["ssh-add", "-L"], timeout_s=30, check=False).stdout
        blob = files.read_text(half, "replace").split()[1:2] if half.is_file() else []
        if not blob or blob[0] not in agent.split():
            add = f"ssh-add {shlex.quote(str(private))}"
            raise StateError(f"{what} is encrypted, and no agent holds it", hint=add)
    elif derived is None:
        said = (shown.stderr.strip().splitlines() or ["it is empty"])[-1]
        raise StateError(f"{what} is invalid: {said}", hint=remedy)
    elif authorized is not None and authorized.blob != derived.blob:
        raise StateError(f"{what} does not match {public}, which guests authorize", hint=remedy)


def install_own_key(place: Place, record: MachineRecord, connection: "Connection") -> None:
    """Authorize the machine's own key instead of its image's, which is refused from then on."""
    own, bootstrap = read_public(place.own_key), read_public(place.bootstrap_key(record))
    user = record.login or record.ssh_user
    change(connection, user, put=[str(own), *record.authorized], drop=[bootstrap.blob], everywhere=True)


def rotate(place: Place, record: MachineRecord) -> PublicKey:
    """Replace a running machine's key; the old one is refused from then on. Open sessions stay open."""
    fresh = place.own_key.with_name("id_ed25519.next")
    target = place.target(record)
    old = read_public(place.own_key)
    stale = [read_public(fresh).blob] if fresh.is_file() else []
    key = make_pair(fresh, f"vmtasks {place.name}")
    with connect.connect(target, timeout_s=CHANGE_S) as connection:
        change(connection, record.ssh_user, put=[str(key)], drop=stale or [key.blob])
    require_login(replace(target, key=fresh, extra_keys=()))
    # From here on the new key is the machine's. A kill before the last step leaves the old one authorized; the next
    # rotation removes all old keys, which `retired` lists.
    retired = place.own_key.with_name("retired")
    with retired.open("a") as file:
        file.write(f"{old.blob}\n")
    fresh.rename(place.own_key)
    public_half(fresh).rename(public_half(place.own_key))
    ssh.stop_sharing(target)
    _change(
        replace(target, key=place.own_key),
        record.ssh_user,
        put=[],
        drop=files.read_text(retired).split(),
        everywhere=True,
    )
    retired.unlink()
    return key


def listed(place: Place, record: MachineRecord, user: str) -> list[AuthorizedKey]:
    """The keys in the guest's authorized_keys of `user`. Skips lines with options or of other kinds."""
    own = read_public(key_in_use(place, record)).blob
    become = "" if user == record.ssh_user else "root"
    done = connect.run(place.target(record), READ, cwd="/", env={"who": user}, user=become, timeout_s=CHANGE_S)
    lines = done.stdout.decode(errors="replace").splitlines()
    found = [key for line in lines if (key := arguments.public_key(line)) is not None]
    return [AuthorizedKey(key, key.blob == own) for key in found]


def key_in_use(place: Place, record: MachineRecord) -> Path:
    """The private key that vmtasks logs in with."""
    return place.target(record).key


def add(place: Place, record: MachineRecord, added: list[PublicKey], user: str) -> None:
    """Authorize public keys for `user`."""
    _change(place.target(record), user, put=[str(key) for key in added], drop=[key.blob for key in added])


def remove(place: Place, record: MachineRecord, which: str, user: str) -> list[PublicKey]:
    """Remove the keys with this fingerprint, comment or public key file; returns them."""
    path = Path(which)
    blobs: set[str] = set()
    if path.is_file():
        blobs = {key.blob for key in arguments.public_keys(path.read_text(errors="replace"), which)}
    there = listed(place, record, user)
    doomed = [item for item in there if item.key.blob in blobs or which in (item.key.fingerprint, item.key.comment)]
    if any(item.is_own for item in doomed):
        raise StateError(f"that is machine {place.name}'s own key", hint=f"vmtasks keys rotate {place.name}")
    if not doomed:
        raise StateError(f"no key of {user} in {place.name} is {which!r}", hint=f"vmtasks keys list {place.name}")
    _change(place.target(record), user, put=[], drop=[item.key.blob for item in doomed])
    return [item.key for item in doomed]


def _change(target: ssh.Target, user: str, *, put: list[str], drop: list[str], everywhere: bool = False) -> None:
    """change(), on a new connection."""
    with connect.connect(target, timeout_s=CHANGE_S) as connection:
        change(connection, user, put=put, drop=drop, everywhere=everywhere)


def change(connection: "Connection", user: str, *, put: list[str], drop: list[str], everywhere: bool = False) -> None:
    """Rewrite authorized_keys in the guest. ConfigError for an unknown user, SshError for other failures."""
    env = {"drop": LINE.join(drop), "put": LINE.join(put), "who": user, "everywhere": "1" if everywhere else ""}
    target = connection.target
    done = connection.execute(CHANGE, cwd="/", env=env, user="root", timeout_s=CHANGE_S)
    if done.status == CANNOT_BECOME and user == target.user:  # without root, only our own file can be changed
        done = connection.execute(CHANGE, cwd="/", env=env, timeout_s=CHANGE_S)
    if done.status == NO_SUCH_USER:
        raise ConfigError(f"machine {target.name} has no user {user!r}; name one that its image has")
    if done.status != 0:
        said = done.stderr.decode(errors="replace").strip() or f"status {done.status}"
        raise SshError(f"the keys of {user} in {target.name} could not be changed: {said}", hint="vmtasks doctor")


def require_login(target: ssh.Target) -> None:
    """SshError unless a new connection with the target's key alone succeeds."""
    try:
        connect.run(target, "true", timeout_s=CHANGE_S)
    except SshError as error:
        raise error.replace(message=f"machine {target.name} does not accept its new key: {error.message}") from error
