"""The first word of the server behind a loopback port that QEMU forwards: what it says, and waiting until it comes."""

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Self

HOST = "127.0.0.1"
CLOSED = "closed before a word"

LEAST_S, MOST_S = 1.0, 10.0
AT_ONCE = 4
PAUSE_S = 0.1
ALIVE_EVERY_S = 0.5


def read(port: int, timeout_s: float) -> str:
    """The first line of the server behind a loopback port, CLOSED, or nothing when it stays silent.

    QEMU closes the connection when the guest's kernel refuses it: that is the kernel's word, so that it works.
    """
    with contextlib.suppress(TimeoutError):
        try:
            with socket.create_connection((HOST, port), timeout=timeout_s) as sock:
                data = sock.recv(255)
        except ConnectionError:
            data = b""
        return data.split(b"\n")[0].decode(errors="replace").strip() if data else CLOSED
    return ""


def wait(port: int, *, timeout_s: float, alive: Callable[[], bool]) -> str:
    """Wait until an SSH server speaks. Returns nothing when one has, else how the port was last, in ssh's words.

    QEMU accepts at once, whatever the guest does. What it then sends to a guest whose network is not up yet is lost,
    and sent again only after seconds: a new connection is quicker. Those before are listened to as well, because a
    guest may be slow. `alive` is asked now and then: when it says no, nothing is waited for any longer.
    """
    began = asked = due = time.monotonic()
    stage = "timed out"
    with _Calls(port) as calls:
        while True:
            now = time.monotonic()
            patience_s = min(max((now - began) / 2, LEAST_S), MOST_S)
            calls.hang_up(before=now - patience_s)
            if now >= due:
                made = calls.make(now)
                stage = stage if made else "Connection refused"
                due = now + (patience_s / AT_ONCE if made else PAUSE_S)
            for said in calls.listen(PAUSE_S):
                if said.startswith("SSH-"):
                    return ""
                stage, due = said, time.monotonic() + PAUSE_S
            if now - began > timeout_s:
                return stage
            if now - asked > ALIVE_EVERY_S:
                asked = now
                if not alive():
                    return stage


class _Calls:
    """Connections on which nobody has spoken yet, with the time at which each was made."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up(before=float("inf"))
        self._open.close()

    def make(self, now: float) -> bool:
        """Begin one more; False when nothing listens on the port."""
        sock = socket.socket()
        sock.settimeout(0)
        if sock.connect_ex((HOST, self._port)) not in (0, errno.EINPROGRESS):
            sock.close()
            return False
        self._open.register(sock, selectors.EVENT_READ, (sock, now))
        return True

    def listen(self, timeout_s: float) -> Iterator[str]:
        """The first words of servers, and why connections have ended, as soon as there are any."""
        for key, _ in self._open.select(timeout_s):
            sock, _ = key.data
            try:
                said = sock.recv(255).decode(errors="replace") or "Connection closed"
            except ConnectionRefusedError:
                said = "Connection refused"
            except OSError:
                said = "Connection reset"
            self._drop(sock)
            yield said

    def hang_up(self, *, before: float) -> None:
        """Give up those that are older."""
        for sock, made in [key.data for key in self._open.get_map().values()]:
            if made < before:
                self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._open.unregister(sock)
        sock.close()
