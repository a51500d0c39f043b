"""QMP events of a machine, which QEMU writes to a file as they happen.

A control socket serves one client at a time and sends events only to it. So QEMU gets a second monitor, whose input is
a file with one command and whose output is a file that any number of readers can read, also after QEMU has ended.
"""

import json
import threading
from pathlib import Path

from vmtasks.host import files

HELLO = b'{"execute": "qmp_capabilities"}\n'
"""Without it a monitor sends no events; see QEMU's qmp-spec."""
EVENT = b'{"timestamp":'
"""The beginning of each event's line."""
BOOT_ENDS = ("RESET", "SHUTDOWN", "GUEST_PANICKED")
NETWORK = "NIC_RX_FILTER_CHANGED"
"""Sent when a virtio driver in the guest first sets its receive filter; other cards do not send it."""
CPU_STOPPED = {"STOP": True, "RESUME": False}


def prepare(base: Path) -> None:
    """Create the files `base`.in and `base`.out, empty but for HELLO; `-chardev pipe` expects these names."""
    for path, content in ((_input(base), HELLO), (_output(base), b"")):
        path.unlink(missing_ok=True)
        path.write_bytes(content)


class Events:
    """The events of the QEMU that was started last with this base. Thread-safe."""

    def __init__(self, base: Path) -> None:
        """The files need not exist yet."""
        self._base = base
        self._started = self._offset = self._ended = 0
        self._cpu_stopped = self._truncated = self._network_up = False
        self._lock = threading.Lock()

    def boot_marker(self) -> str:
        """A string that changes with each reset, power-off, panic and start of QEMU; '' without events.

        A reset sends more than one event, so that the marker may change twice within a second.
        """
        with self._lock:
            return f"{self._started}-{self._ended}" if self._update() and self._offset else ""

    def cpu_stopped(self) -> bool:
        """Whether the guest's CPU is stopped: paused, after a panic, or because the host's disk is full."""
        with self._lock:
            return self._update() and self._cpu_stopped

    def network_up(self) -> bool:
        """Whether the guest has brought up its network card since QEMU started. Known for virtio cards only."""
        with self._lock:
            return self._update() and self._network_up

    def truncated(self) -> bool:
        """Whether the last line is incomplete, as when the host's disk is full and QEMU cannot write events."""
        with self._lock:
            return self._update() and self._truncated

    def _update(self) -> bool:
        """Read new events; False when there is no file."""
        try:
            started, size = _input(self._base).stat().st_mtime_ns, _output(self._base).stat().st_size
            if started != self._started or size < self._offset:
                self._started, self._offset, self._ended, self._cpu_stopped = started, 0, 0, False
                self._network_up = False
            if size > self._offset:
                self._read()
        except OSError:
            return False
        return True

    def _read(self) -> None:
        """Read the new lines. The last may be incomplete; lines that are not JSON are skipped."""
        with files.opened(_output(self._base)) as record:
            record.seek(self._offset)
            new = record.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._truncated = len(whole) < len(new)
        self._offset += len(whole)
        for line in whole.splitlines():
            name = _event(line)
            self._ended += name in BOOT_ENDS
            self._cpu_stopped = CPU_STOPPED.get(name, self._cpu_stopped)
            self._network_up = self._network_up or name == NETWORK


def _event(line: bytes) -> str:
    """The name of the event in a line, or ''.

    On a full disk QEMU writes part of a line, and continues with the next event on the same line.
    """
    try:
        message = json.loads(line[max(0, line.rfind(EVENT)) :])
    except (ValueError, RecursionError):
        return ""
    name = message.get("event") if isinstance(message, dict) else None
    return name if isinstance(name, str) else ""


def _input(base: Path) -> Path:
    return base.with_name(f"{base.name}.in")


def _output(base: Path) -> Path:
    return base.with_name(f"{base.name}.out")
