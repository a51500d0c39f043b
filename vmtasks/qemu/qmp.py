"""QEMU's control socket (QMP): lines of JSON both ways, one client at a time; see QEMU's docs/interop/qmp-spec.rst.

Synchronous on purpose: a signal may raise KeyboardInterrupt at any moment, which breaks an event loop.
"""

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmtasks.errors import MachineError

ANSWER_S = 10.0
LINE_BYTES = 64 << 20
"""More than QEMU's longest answer, query-qmp-schema; bounds the memory that another server on the socket can use."""
STUCK = {
    "paused": "its CPU is paused, so that nothing in the guest can answer",
    "guest-panicked": "the guest's kernel panicked; QEMU keeps it as it was then",
    "internal-error": "QEMU stopped it after an error of its own",
    "io-error": "QEMU stopped it because its disk could not be written: is the host's disk full?",
    "shutdown": "the guest has powered off",
}
"""Run states of a machine that does not resume by itself, explained; see QEMU's qapi/run-state.json."""
FULL, PANICKED = "io-error", "guest-panicked"
log = logging.getLogger(__name__)


class Qmp:
    """A connection. Commands raise MachineError when QEMU refuses them, has ended, or does not answer in time."""

    def __init__(self, channel: socket.socket) -> None:
        """`channel` is connected; call handshake() first."""
        self._channel = channel
        self._unread = bytearray()
        self._events: list[dict[str, Any]] = []
        self._number = 0

    def handshake(self, timeout_s: float) -> None:
        """Wait for the greeting, which QEMU delays while it serves another client, and enter command mode. OSError."""
        deadline = time.monotonic() + timeout_s
        if "QMP" not in self._receive(deadline):
            raise ConnectionError("the server is not QEMU")
        self._call("qmp_capabilities", {}, deadline)

    def cmd(self, name: str, /, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns."""
        log.debug("qmp %s %s", name, arguments)
        try:
            return self._call(name, arguments, time.monotonic() + ANSWER_S)
        except OSError as error:
            raise MachineError(f"QEMU did not carry out {name}: {error}") from error

    def events(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Events since the last call, including those from just before QEMU ended.

        If there are none, waits up to `wait_s` for the first.
        """
        deadline = time.monotonic() + wait_s
        with contextlib.suppress(OSError):
            while not self._events:
                self._store_event(self._receive(deadline))
            while True:
                self._store_event(self._receive(0.0))
        events, self._events = self._events, []
        return events

    def screenshot(self, path: Path) -> bool:
        """Save the framebuffer as PNG; False if there is none or QEMU cannot."""
        with contextlib.suppress(MachineError):
            self.cmd("screendump", filename=str(path), format="png")
            return path.is_file()
        return False

    def _call(self, name: str, arguments: dict[str, Any], deadline: float) -> Any:
        self._number += 1
        request = {"execute": name, "arguments": arguments, "id": self._number}
        self._channel.settimeout(ANSWER_S)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive(deadline)
            if message.get("id", self._number) != self._number:
                continue  # the answer to an earlier command whose caller was interrupted
            if "return" in message:
                return message["return"]
            if "error" in message:
                error = message["error"]
                raise ConnectionError(error.get("desc") if isinstance(error, dict) else error)
            self._store_event(message)

    def _store_event(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._events.append(message)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; OSError when none comes before `deadline` or QEMU is gone."""
        while b"\n" not in self._unread:
            self._channel.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                data = self._channel.recv(65536)
            except (TimeoutError, BlockingIOError):
                raise TimeoutError("it did not answer in time") from None
            if not data:
                raise ConnectionError("it has closed its control socket")
            self._unread += data
            if len(self._unread) > LINE_BYTES:
                raise ConnectionError("its message is too long")
        line, _, rest = self._unread.partition(b"\n")
        self._unread = rest
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ConnectionError(f"it does not speak QMP: {bytes(line[:80])!r}")
        return message


@contextlib.contextmanager
def connect(path: Path, *, timeout_s: float, ended: Callable[[], bool] = lambda: False) -> Iterator[Qmp]:
    """Connect to QEMU's control socket once it exists. MachineError after `timeout_s`, or when `ended`."""
    deadline = time.monotonic() + timeout_s
    while True:
        with socket.socket(socket.AF_UNIX) as channel:
            control = Qmp(channel)
            try:
                channel.settimeout(ANSWER_S)
                channel.connect(str(path))
                control.handshake(max(1.0, deadline - time.monotonic()))
            except OSError as error:
                if ended() or time.monotonic() > deadline:
                    raise MachineError(
                        f"QEMU's control socket did not answer within {timeout_s:g} s ({error})"
                    ) from None
            else:
                try:
                    yield control
                finally:
                    # close() is Python code that a signal can cut short, and the caller's frame would keep the socket
                    # open; shutdown() is one call into C, after which QEMU serves the next client in any case.
                    try:  # noqa: SIM105 - contextlib.suppress is Python code
                        channel.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass
                return
        time.sleep(0.05)


def status(path: Path) -> str:
    """The machine's run state: `running`, a key of STUCK or a rarer one; '' when QEMU does not answer within 3 s."""
    try:
        with connect(path, timeout_s=3, ended=lambda: not path.exists()) as control:
            return str(control.cmd("query-status")["status"])
    except MachineError:
        return ""
