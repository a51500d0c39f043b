"""Copy trees to and from a guest with rsync, itemized and counted. Owns rsync's argv."""

import contextlib
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmtasks.errors import CommandError, SshError
from vmtasks.guest import connect
from vmtasks.guest.exclude import effective, literal
from vmtasks.guest.ssh import FAILED, Target
from vmtasks.host import process
from vmtasks.host.progress import Say

ASK_BYTES = 32 << 20
"""A smaller tree is sent without checking the guest's free space."""
ROOM_S = 60.0
TIMEOUT_S = 3600.0
ERROR_BYTES = 1 << 20
"""How much of rsync's stderr is kept."""
PARTIAL = 23
"""rsync's exit status for a partial transfer: some files failed, all others were copied."""
VANISHED = 24
"""Its exit status when files vanished while it ran."""
RSYNC_CONNECTION = (10, 12, 30, 35, FAILED)
"""rsync's exit statuses for a failed connection; see rsync(1), EXIT VALUES."""

ROOM = 'd=$dest; while [ ! -d "$d" ]; do d=$(dirname "$d"); done; df -Pk "$d"'
"""Prints free space at a folder, existing or not: fourth column of the last line, in KiB (POSIX)."""
FULL = "No space left on device"
DENIED = re.compile("Permission denied|Operation not permitted")
SENDER = re.compile(r"\[sender\]|send_files failed")
"""Matches an error line of the reading side."""


@dataclass(frozen=True)
class Filter:
    """The paths that are not copied, and the size of the rest.

    `hidden` and `left` are paths of the tree as bytes, folders end in `/`; no pattern overrides `hidden`. `exclude`
    holds rsync patterns. `size`: the total in bytes that may be copied.
    """

    hidden: Sequence[bytes] = ()
    exclude: Sequence[str] = ()
    left: Sequence[bytes] = ()
    size: int = 0

    def argv(self) -> list[str]:
        """Options for rsync. `left` goes through stdin, because it may be long."""
        hidden = [f"--exclude={os.fsdecode(literal(path))}" for path in self.hidden]
        exclude = [f"--exclude={pattern}" for pattern in effective(self.exclude)]
        return [*hidden, *exclude, "--from0", "--exclude-from=-"]

    def stdin(self, more: Iterable[bytes] = ()) -> bytes:
        """The stdin of rsync. `more`: further paths to exclude."""
        return b"".join(literal(path) + b"\0" for path in (*self.left, *more))


NO_FILTER = Filter()


@dataclass(frozen=True)
class Synced:
    """The changes that rsync made. `left`: the number of source paths not sent because git ignores them."""

    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    left: int = 0

    def __str__(self) -> str:
        """`3 sent, 1 deleted`, or `nothing to send`."""
        ignored = f" ({self.left} not sent: ignored by git)" if self.left else ""
        if not self.sent and not self.deleted:
            return f"nothing to send{ignored}"
        return f"{len(self.sent)} sent, {len(self.deleted)} deleted{ignored}"


class SentReporter:
    """Reports every ten seconds how many files were sent. Its argument is rsync's output, one line for each file."""

    EVERY_S = 10.0

    def __init__(self, say: Say, total: int = 0) -> None:
        """`total` 0: unknown."""
        self.say = say
        self.total = total
        self.last = time.monotonic()

    def __call__(self, out: bytes | bytearray) -> None:
        """Report if it is time."""
        if time.monotonic() - self.last >= self.EVERY_S:
            self.last = time.monotonic()
            count = out.count(b"\n")
            self.say(f"{min(count, self.total)} of {self.total} files sent" if self.total else f"{count} files sent")


class NoRoomError(CommandError):
    """The guest has no room for the files. Nothing was copied."""


def sync(
    target: Target,
    source: Path,
    dest: str,
    filters: Filter = NO_FILTER,
    *,
    delete: bool = True,
    keep: Callable[[bytes], bool] | None = None,
    say: Say = lambda _: None,
    thorough: bool = False,
) -> Synced:
    """Make `dest` in the guest equal to `source`, except for the paths that `filters` exclude.

    `keep` returns whether a path that exists only in the guest is kept. `say` gets the progress of a long transfer.
    `thorough` is for a guest that lost power: it compares contents and removes build products. Files keep mode and
    mtime and belong to the login user; hard links become separate files. SshError when the guest is not reached,
    CommandError when some files could not be copied; both give the reason on one line.
    """
    argv = [
        *_rsync(target, f"mkdir -p {shlex.quote(dest)} && rsync"),
        "-D",
        *(["--delete"] if delete else []),
        *(["--checksum", "--delete-excluded"] if thorough else []),
        *filters.argv(),
        "--",
        f"{source}/",
        f"{target.name}:{dest}/",
    ]
    stay: list[bytes] = []
    reporter = SentReporter(say)
    kept = keep if delete and not thorough else None
    if kept is not None or filters.size > ASK_BYTES:
        would = parse_itemized(_run(target, _dry_run(argv), filters.stdin()))
        stay = outermost(path for path in map(os.fsencode, would.deleted) if kept is not None and kept(path))
        reporter.total = len(would.sent)
        need = require_room(target, source, dest, would.sent)
        if need > ASK_BYTES:
            say(f"{reporter.total} files to send, {need >> 20} MiB")
    done = parse_itemized(_run(target, argv, filters.stdin(stay), reporter))
    return Synced(done.sent, done.deleted, len(filters.left))


def copy(
    target: Target, source: str, dest: str, filters: Filter = NO_FILTER, *, back: bool = False, as_root: bool = False
) -> Synced:
    """Copy newer files of `source` to the guest, or `back` from it. Deletes nothing.

    `as_root` writes in the guest as root. Files that come back are not trusted: no devices, no links out of the folder.
    SshError when the guest is not reached, CommandError when some files could not be copied; both give the reason on
    one line.
    """
    root = "$(command -v doas || command -v sudo) -n " if as_root and target.user != "root" else ""
    argv = [*_rsync(target, f"{root}rsync"), "--update", *(["--safe-links"] if back else []), *filters.argv(), "--"]
    argv += [f"{target.name}:{source}", dest] if back else [source, f"{target.name}:{dest}"]
    if filters.size > ASK_BYTES and not back:
        require_room(target, Path(source), dest, parse_itemized(_run(target, _dry_run(argv), filters.stdin())).sent)
    return parse_itemized(_run(target, argv, filters.stdin()))


def require_room(target: Target, source: Path, dest: str, names: Iterable[str]) -> int:
    """The size in bytes of these files of `source`. NoRoomError when the guest has less free space at `dest`."""
    need = 0
    for name in names:
        with contextlib.suppress(OSError):
            need += allocated_bytes(Path(source, name).lstat())
    if need <= ASK_BYTES:
        return need
    try:
        asked = connect.run(target, ROOM, cwd=".", env={"dest": dest}, timeout_s=ROOM_S)
    except SshError:
        return need  # rsync will report why
    columns = asked.stdout.decode(errors="replace").strip().rpartition("\n")[2].split()
    if asked.status != 0 or len(columns) < 4 or not columns[3].isdigit():
        return need  # rsync will report it
    free = int(columns[3]) << 10
    if need > free:
        raise NoRoomError(
            f"{need >> 20} MiB are to be copied, and the guest has {free >> 20} MiB free at {dest}; nothing was copied",
            status=PARTIAL,
        )
    return need


def allocated_bytes(info: os.stat_result) -> int:
    """The bytes that a file occupies, without holes."""
    return min(info.st_size, info.st_blocks * 512)


def outermost(paths: Iterable[bytes]) -> list[bytes]:
    """The paths that are not below another one; folders end in `/`."""
    found: list[bytes] = []
    for path in sorted(paths):
        if not (found and found[-1].endswith(b"/") and path.startswith(found[-1])):
            found.append(path)
    return found


def write_denied(error: CommandError) -> bool:
    """Whether the writing side was denied access, and the reading side reports no error."""
    said = [line for line in error.stderr.splitlines() if DENIED.search(line)]
    return bool(said) and not read_failed(error)


def read_failed(error: CommandError) -> bool:
    """Whether the reading side failed."""
    return any(SENDER.search(line) for line in error.stderr.splitlines())


def parse_itemized(out: str) -> Synced:
    """Parse `--out-format='%i %n'`: files and links that were sent (no folders), and paths that were deleted."""
    sent, deleted = [], []
    for line in out.split("\n"):
        flags, _, name = line.partition(" ")
        if flags == "*deleting":
            deleted.append(_name(name.removeprefix("  ")))  # %i is 11 wide
        elif flags[:1] in "<>ch" and flags[1:2] in "fLDS" and len(flags) > 9:
            sent.append(_name(name))
    return Synced(tuple(sent), tuple(deleted))


def _name(text: str) -> str:
    r"""Decode a name as rsync prints it, with unprintable bytes as `\#ooo`."""
    return os.fsdecode(re.sub(rb"\\#([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), os.fsencode(text)))


def _rsync(target: Target, there: str) -> list[str]:
    """The common argv of all copies; `there` starts rsync in the guest."""
    return [
        "rsync",
        "-rlpts",  # s: names bypass the remote shell, whose quoting differs between versions
        "--sparse",
        "--outbuf=L",
        "--out-format=%i %n",
        "-e",
        f"ssh -F {shlex.quote(str(target.config))}",
        "--rsync-path",
        there,
    ]


def _dry_run(argv: Sequence[str]) -> list[str]:
    return [argv[0], "--dry-run", *argv[1:]]


def _run(target: Target, argv: Sequence[str], stdin: bytes, reporter: SentReporter | None = None) -> str:
    """Run rsync, a second time if files vanished while it ran; returns its output."""
    ended, said, stderr = _run_once(argv, stdin, reporter)
    if ended.status == VANISHED:
        ended, again, stderr = _run_once(argv, stdin, reporter)
        said += again
    if ended.status == 0:
        return said
    lines = [line for line in stderr.splitlines() if line.strip()]
    why = (
        _strip_prefix(lines[0]) if lines else f"rsync ended with status {ended.status}"
    )  # later errors follow from the first
    if ended.timed_out:
        why = f"rsync did not end within {TIMEOUT_S:g} s"
    if ended.status in RSYNC_CONNECTION:
        raise SshError(f"rsync could not connect, or lost the connection, to {target.name}: {why}")
    raise CommandError(why, status=ended.status, stderr=stderr, timed_out=ended.timed_out)


def _run_once(argv: Sequence[str], stdin: bytes, reporter: SentReporter | None) -> tuple[process.Ended, str, str]:
    out = bytearray()
    errors = process.Head(ERROR_BYTES)
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)

        def take(data: bytes) -> None:
            out.extend(data)
            if reporter is not None:
                reporter(out)

        ended = process.stream(argv, take, timeout_s=TIMEOUT_S, errors=errors, stdin=given, env={"LC_ALL": "C"})
    return ended, os.fsdecode(bytes(out)), errors.text


def _strip_prefix(line: str) -> str:
    """A line of rsync's without its `rsync:` prefix."""
    return re.sub(r"\Arsync: (\[\w+\] )?", "", line.strip())
