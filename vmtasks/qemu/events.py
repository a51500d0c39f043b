"""QEMU's own account of a machine: its events, which QEMU itself writes to a file as they happen.

A control socket serves one client at a time and tells its events to nobody else. So QEMU is given a second monitor,
whose input is a file with one command and whose output is the record: any number of readers may look, also later.
"""

import json
import threading
from pathlib import Path

from vmtasks.host import files

HELLO = b'{"execute": "qmp_capabilities"}\n'
"""Without it a monitor tells no events; see QEMU's qmp-spec."""
EVENT = b'{"timestamp":'
"""How QEMU begins each event."""
BOOT_ENDS = ("RESET", "SHUTDOWN", "GUEST_PANICKED")
NETWORK = "NIC_RX_FILTER_CHANGED"
"""The guest's driver has said what its card shall receive. Only virtio's tells, and once."""
STANDS = {"STOP": True, "RESUME": False}


def prepare(base: Path) -> None:
    """Make the two files `base`.in and `base`.out anew, by the names that `-chardev pipe` takes."""
    for path, content in ((_input(base), HELLO), (_output(base), b"")):
        path.unlink(missing_ok=True)
        path.write_bytes(content)


class Events:
    """The record of the QEMU that was started last with this base. To be asked from any thread."""

    def __init__(self, base: Path) -> None:
        """It need not be there yet."""
        self._base = base
        self._started = self._offset = self._ended = 0
        self._stands = self._cut = self._network = False
        self._lock = threading.Lock()

    def boot(self) -> str:
        """A word that is another one after each reset, power-off, panic and start of QEMU; empty where none is known.

        A reset makes more than one event, so that the word may change again within the second.
        """
        with self._lock:
            return f"{self._started}-{self._ended}" if self._look() and self._offset else ""

    def cpu_stopped(self) -> bool:
        """Whether the guest's CPU stands still: somebody has paused it, its kernel has panicked, its disk is full."""
        with self._lock:
            return self._look() and self._stands

    def network(self) -> bool:
        """Whether a guest has brought up its card since QEMU was started. Only a virtio card's driver shows it."""
        with self._lock:
            return self._look() and self._network

    def cut(self) -> bool:
        """Whether the last line is not whole: on a full disk QEMU cannot write what has become of its guest."""
        with self._lock:
            return self._look() and self._cut

    def _look(self) -> bool:
        """Take in what is new; False when there is no record."""
        try:
            started, size = _input(self._base).stat().st_mtime_ns, _output(self._base).stat().st_size
            if started != self._started or size < self._offset:
                self._started, self._offset, self._ended, self._stands = started, 0, 0, False
                self._network = False
            if size > self._offset:
                self._read()
        except OSError:
            return False
        return True

    def _read(self) -> None:
        """Take in what has come; the last line may not be whole yet. A line that cannot be read tells nothing."""
        with files.opened(_output(self._base)) as record:
            record.seek(self._offset)
            new = record.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._cut = len(whole) < len(new)
        self._offset += len(whole)
        for line in whole.splitlines():
            name = _event(line)
            self._ended += name in BOOT_ENDS
            self._stands = STANDS.get(name, self._stands)
            self._network = self._network or name == NETWORK


def _event(line: bytes) -> str:
    """The name of the event that a line tells of; empty for all other lines.

    On a full disk QEMU writes as much of a line as there is room for. The next one then follows on the same line.
    """
    try:
        told = json.loads(line[max(0, line.rfind(EVENT)) :])
    except (ValueError, RecursionError):
        return ""
    name = told.get("event") if isinstance(told, dict) else None
    return name if isinstance(name, str) else ""


def _input(base: Path) -> Path:
    return base.with_name(f"{base.name}.in")


def _output(base: Path) -> Path:
    return base.with_name(f"{base.name}.out")
