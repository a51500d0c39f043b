"""Facts about the processes of this computer, from /proc, or from ps(1) on systems without it."""

import os
import sys
from pathlib import Path

from vmtasks.host import process

PS_S = 10.0


def started(pid: int) -> str:
    """The start of a process, as a text to compare, or '' if there is no such process.

    Only pid and start together identify a process, because pids recur. Source: proc(5), field 22 of stat; ps elsewhere.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return ""
        fields = stat.rpartition(")")[2].split()
        # The first thread may be a zombie while others still hold the process's files.
        return "" if fields[0] in "ZX" and fields[17] in "01" else fields[19]
    return _ps("-o", "lstart=", "-p", str(pid)).strip()


def numbers() -> list[int]:
    """The pids of all visible processes."""
    if sys.platform == "linux":
        return [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    listed = _ps("-axo", "pid=")
    return [int(word) for word in listed.split() if word.isdigit()]


def user(pid: int) -> int | None:
    """The uid of a process, or None if it has ended."""
    if sys.platform == "linux":
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        found = next((line.split() for line in status.splitlines() if line.startswith("Uid:")), [])
        return int(found[2]) if len(found) > 2 else None
    said = _ps("-o", "uid=", "-p", str(pid)).strip()
    return int(said) if said.isdigit() else None


def words(pid: int) -> list[str]:
    """The argv of a process; [] if it has ended. Without /proc it is split at spaces."""
    if sys.platform == "linux":
        try:
            return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
        except OSError:
            return []
    return command_line(pid).split()


def command_line(pid: int) -> str:
    """The argv of a process, joined by spaces; '' if it has ended or is unreadable."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    return _ps("-o", "args=", "-p", str(pid)).strip()


def _ps(*words: str) -> str:
    """The output of ps(1), for systems without /proc."""
    return process.run(["ps", *words], timeout_s=PS_S, check=False).stdout
