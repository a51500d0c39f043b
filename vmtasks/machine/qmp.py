"""QEMU's control socket, used synchronously. Owns qemu.qmp."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmtasks.errors import MachineError
from vmtasks.interrupts import whole

ANSWER_S = 10.0
STUCK = {
    "paused": "its CPU is paused, so that nothing in the guest can answer",
    "guest-panicked": "the guest's kernel panicked; QEMU keeps it as it was then",
    "internal-error": "QEMU stopped it after an error of its own",
    "io-error": "QEMU stopped it because its disk could not be written: is the host's disk full?",
    "shutdown": "the guest has powered off",
}
"""What QMP calls a machine that will not run on by itself, and what that means; see QEMU's qapi/run-state.json."""
FULL, PANICKED = "io-error", "guest-panicked"
log = logging.getLogger(__name__)


class Qmp:
    """A connection. Commands raise MachineError when QEMU refuses them, is gone, or does not answer in time."""

    def __init__(self, protocol: Any) -> None:
        """`protocol` is a connected QEMUMonitorProtocol."""
        self._protocol = protocol
        self._protocol.settimeout(ANSWER_S)

    def cmd(self, name: str, /, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns."""
        from qemu.qmp import QMPError  # noqa: PLC0415

        log.debug("qmp %s %s", name, arguments)
        try:
            return self._protocol.cmd(name, **arguments)
        except (TimeoutError, QMPError, OSError, EOFError) as error:
            raise MachineError(f"QEMU did not carry out {name}: {type(error).__name__} {error}".rstrip()) from error

    def events(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Events that have come since the last call, also those from just before QEMU ended."""
        from qemu.qmp import QMPError  # noqa: PLC0415

        found: list[dict[str, Any]] = []
        with contextlib.suppress(QMPError, OSError, EOFError):
            first = self._protocol.pull_event(wait=wait_s if wait_s > 0 else False)
            if first is not None:
                found.append(dict(first))
        with contextlib.suppress(QMPError, OSError, EOFError):
            found += [dict(event) for event in self._protocol.get_events()]
        return found

    def screenshot(self, path: Path) -> bool:
        """Save the framebuffer as PNG; False where there is none or QEMU cannot."""
        with contextlib.suppress(MachineError):
            self.cmd("screendump", filename=str(path), format="png")
            return path.is_file()
        return False


@contextlib.contextmanager
def connect(path: Path, *, timeout_s: float, ended: Callable[[], bool] = lambda: False) -> Iterator[Qmp]:
    """Open QEMU's control socket, which it makes soon after it starts. MachineError when it does not or has ended."""
    from qemu.qmp import QMPError  # noqa: PLC0415
    from qemu.qmp.legacy import QEMUMonitorProtocol  # noqa: PLC0415

    for noisy in ("asyncio", "qemu.qmp"):  # of a connection that was given up they speak at length
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    deadline = time.monotonic() + timeout_s
    while True:
        with whole():  # one that was half made complains when it is collected
            protocol = QEMUMonitorProtocol(str(path))
        try:
            # Not its connect(): that waits for ever for a greeting, which QEMU owes while another client is served.
            greeted = protocol._qmp.connect(protocol._address)  # noqa: SLF001 - it has no other door
            protocol._sync(greeted, max(1.0, deadline - time.monotonic()))  # noqa: SLF001
            break
        except (TimeoutError, QMPError, OSError, EOFError) as error:
            with contextlib.suppress(Exception):
                protocol.close()
            if ended() or time.monotonic() > deadline:
                raise MachineError(f"QEMU's control socket did not answer within {timeout_s:g} s ({error})") from None
            time.sleep(0.05)
    try:
        yield Qmp(protocol)
    finally:
        with contextlib.suppress(Exception):  # closing a connection whose QEMU is gone raises what it likes
            protocol.close()


def status(path: Path) -> str:
    """What QEMU calls a machine: `running`, a key of STUCK or a rarer word; empty when it does not answer soon."""
    try:
        with connect(path, timeout_s=3, ended=lambda: not path.exists()) as control:
            return str(control.cmd("query-status")["status"])
    except MachineError:
        return ""
