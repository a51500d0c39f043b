"""QEMU's own account of a machine: its events, which QEMU itself writes to a file as they happen.

A control socket serves one client at a time and tells its events to nobody else. So QEMU is given a second monitor,
whose input is a file with one command and whose output is the record: any number of readers may look, also later.
"""

import json
from pathlib import Path

HELLO = b'{"execute": "qmp_capabilities"}\n'
"""Without it a monitor tells no events; see QEMU's qmp-spec."""
BOOT_ENDS = ("RESET", "SHUTDOWN", "GUEST_PANICKED")


def prepare(base: Path) -> None:
    """Make the two files `base`.in and `base`.out anew, by the names that `-chardev pipe` takes."""
    for path, content in ((_input(base), HELLO), (_output(base), b"")):
        path.unlink(missing_ok=True)
        path.write_bytes(content)


class Events:
    """The record of the QEMU that was started last with this base."""

    def __init__(self, base: Path) -> None:
        """It need not be there yet."""
        self._base = base
        self._size = -1
        self._ended = 0

    def boot(self) -> str:
        """A word that is another one after each reset, power-off, panic and start of QEMU; empty where none is known.

        A reset makes more than one event, so that the word may change again within the second.
        """
        try:
            started, size = _input(self._base).stat().st_mtime_ns, _output(self._base).stat().st_size
            if size != self._size:
                self._ended = sum(name in BOOT_ENDS for name in _names(_output(self._base).read_bytes()))
                self._size = size
        except OSError:
            return ""
        return f"{started}-{self._ended}" if size else ""


def _names(record: bytes) -> list[str]:
    """The names of the events in a record, whose last line may not be whole yet."""
    whole = record[: record.rfind(b"\n") + 1]
    return [str(json.loads(line).get("event", "")) for line in whole.splitlines() if line.strip()]


def _input(base: Path) -> Path:
    return base.with_name(f"{base.name}.in")


def _output(base: Path) -> Path:
    return base.with_name(f"{base.name}.out")
