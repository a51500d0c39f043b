"""Copy one file, of any name, atomically into a guest or out of it.

The bytes go through the shared OpenSSH connection, which is several times as fast as one from Python. The receiving
side writes a temporary file beside the destination, syncs it, and renames it.
"""

import posixpath
import re
import secrets
import shlex
from pathlib import Path

from vmtasks.errors import CommandError, ConnectionLostError
from vmtasks.guest import ssh
from vmtasks.guest.ssh import Target
from vmtasks.host import files, process

TIMEOUT_S = 3600.0

# Not every dd knows conv=fsync; sync works everywhere.
PUT = """
mkdir -p @FOLDER@ || exit 1
umask 077
cat >@BESIDE@ && chmod @MODE@ @BESIDE@ || { rm -f @BESIDE@; exit 1; }
dd if=/dev/null of=@BESIDE@ conv=notrunc,fsync 2>/dev/null || sync
[ ! -d @PLACE@ ] || { rm -f @BESIDE@; echo "it is a folder" >&2; exit 1; }
mv -f @BESIDE@ @PLACE@ || { rm -f @BESIDE@; exit 1; }
"""

GET = """
[ -f @PLACE@ ] || { [ -e @PLACE@ ] && echo 'it is not a plain file' >&2 || echo 'there is none' >&2; exit 1; }
[ ! -x @PLACE@ ] || echo ::vmtasks:x >&2
exec cat @PLACE@
"""


def put(target: Target, source: Path, dest: str, *, mode: int | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Copy a local file to `dest` in the guest, absolute or relative to the login user's home.

    A `dest` that ends in `/` is a folder. Creates missing folders. `mode` defaults to that of `source`.
    OSError when `source` cannot be read, CommandError when `dest` cannot be written, ConnectionLostError when the
    connection broke. `dest` is then unchanged or complete.
    """
    place = posixpath.join(dest, source.name) if dest.endswith("/") else dest
    folder = posixpath.dirname(place)
    beside = posixpath.join(folder, f".vmtasks-{secrets.token_hex(8)}")
    with source.open("rb") as data:
        bits = source.stat().st_mode & 0o777 if mode is None else mode
        words = {"FOLDER": _word(folder), "BESIDE": _word(beside), "PLACE": _word(place), "MODE": f"{bits:o}"}
        text = re.sub("@([A-Z]+)@", lambda found: words[found[1]], PUT)
        said = bytearray()
        ended = process.stream(target.argv(ssh.remote_line(text)), said.extend, timeout_s=timeout_s, stdin=data)
    _check(ended, said.decode(errors="replace"), f"{source} could not be copied to {target.name}:{place}", timeout_s)


def get(target: Target, source: str, dest: Path, *, timeout_s: float = TIMEOUT_S) -> Path:
    """Copy a file of the guest to `dest`, a file or an existing folder; returns the path of the copy.

    Keeps the executable bit. CommandError when `source` cannot be read, ConnectionLostError when the connection broke,
    OSError when `dest` cannot be written. An existing file is then unchanged.
    """
    place = dest / posixpath.basename(source) if dest.is_dir() else dest
    text = GET.replace("@PLACE@", _word(source))
    errors = process.Head()
    with files.replacing(place) as beside:
        with beside.open("wb") as data:
            argv = target.argv(ssh.remote_line(text))
            ended = process.stream(argv, data.write, timeout_s=timeout_s, errors=errors)
        said = errors.text
        _check(ended, said, f"{target.name}:{source} could not be fetched", timeout_s)
    if "::vmtasks:x" in said:
        place.chmod(0o755)
    return place


def _word(path: str) -> str:
    """A path as a shell word that no program reads as an option."""
    return shlex.quote(path if path.startswith("/") else f"./{path}")


def _check(ended: process.Ended, said: str, what: str, limit_s: float) -> None:
    said = " ".join(line for line in said.splitlines() if not line.startswith("::vmtasks"))
    if ended.status == ssh.FAILED:
        raise ConnectionLostError(f"{what}: {ssh.last_line(said)}", hint="doit status")
    if ended.timed_out:
        raise CommandError(f"{what} within {limit_s:g} s", status=ended.status, stderr=said, timed_out=True)
    if ended.status != 0:
        raise CommandError(f"{what}: {said or f'status {ended.status}'}", status=ended.status, stderr=said)
