"""A source tree -> a guest, with rsync, itemised and counted. Owns rsync."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmtasks import proc
from vmtasks.errors import CommandError, SshError
from vmtasks.remote.ssh import FAILED, Target

TIMEOUT_S = 3600.0
PARTIAL = 23
"""rsync's status when it could not copy some files, but all others."""
RSYNC_CONNECTION = (10, 12, 30, 35, FAILED)
"""rsync's own statuses for a connection that failed; see rsync(1), EXIT VALUES."""


@dataclass(frozen=True)
class Synced:
    """What rsync changed in the guest."""

    sent: tuple[str, ...]
    deleted: tuple[str, ...]

    def __str__(self) -> str:
        """`3 sent, 1 deleted`, or `nothing to send`."""
        if not self.sent and not self.deleted:
            return "nothing to send"
        return f"{len(self.sent)} sent, {len(self.deleted)} deleted"


def sync(
    target: Target, source: Path, dest: str, exclude: Sequence[str], *, delete: bool = True, thorough: bool = False
) -> Synced:
    """Make `dest` in the guest equal to `source`, but for `exclude` (rsync patterns, `/` anchors them at the source).

    `thorough` is for a guest that lost its power: contents are compared, and what was built there is removed.
    Files keep mode and time and belong to the login user. SshError when the guest is not reached.
    """
    argv = [
        "rsync",
        "-rlptDs",  # s: names go past the remote shell; how they are quoted for it differs between versions
        "--out-format=%i %n",
        *(["--delete"] if delete else []),
        *(["--checksum", "--delete-excluded"] if thorough else []),
        *(f"--exclude={pattern}" for pattern in exclude),
        "-e",
        f"ssh -F {shlex.quote(str(target.config))}",
        "--rsync-path",
        f"mkdir -p {shlex.quote(dest)} && rsync",
        "--",
        f"{source}/",
        f"{target.name}:{dest}/",
    ]
    try:
        out = proc.run(argv, timeout_s=TIMEOUT_S).stdout
    except CommandError as error:
        if error.status in RSYNC_CONNECTION:
            raise SshError(
                f"sync: rsync lost or never had the connection to {target.name}: {error.stderr.strip()}"
            ) from None
        raise
    return itemised(out)


def copy(target: Target, source: str, dest: str, *, back: bool = False, as_root: bool = False) -> Synced:
    """Copy what is newer in `source`, deleting nothing: to the guest, or `back` from it.

    `as_root` writes in the guest as root. What comes back is not trusted: no devices, no links that lead out of the
    folder. SshError when the guest is not reached, CommandError when not all could be copied; both say why on one line.
    """
    root = "$(command -v doas || command -v sudo) -n " if as_root and target.user != "root" else ""
    argv = ["rsync", "-rlptus", "--out-format=%i %n", "-e", f"ssh -F {shlex.quote(str(target.config))}"]
    argv += ["--safe-links"] if back else []
    argv += ["--rsync-path", f"{root}rsync", "--"]
    argv += [f"{target.name}:{source}", dest] if back else [source, f"{target.name}:{dest}"]
    try:
        return itemised(proc.run(argv, timeout_s=TIMEOUT_S).stdout)
    except CommandError as error:
        why = reason(error)
        if error.status in RSYNC_CONNECTION:
            raise SshError(f"rsync lost or never had the connection to {target.name}: {why}") from None
        raise CommandError(why, status=error.status, stderr=error.stderr) from None


def reason(error: CommandError) -> str:
    """The first line that rsync, or ssh below it, has said: later ones follow from it."""
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    return lines[0] if lines else f"rsync ended with status {error.status}"


def itemised(out: str) -> Synced:
    """What `--out-format='%i %n'` says: files and links that were sent (folders left out), and what was deleted."""
    sent, deleted = [], []
    for line in out.split("\n"):
        flags, _, name = line.partition(" ")
        if flags == "*deleting":
            deleted.append(name.removeprefix("  "))  # %i is 11 wide
        elif flags[:1] in "<>ch" and flags[1:2] in "fLDS" and len(flags) > 9:
            sent.append(name)
    return Synced(tuple(sent), tuple(deleted))
