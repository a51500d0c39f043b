"""The banner of the server behind a loopback port that QEMU forwards: read it, or wait for it."""

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Self

HOST = "127.0.0.1"
CLOSED = "closed without a banner"
NO_LISTENER = "nothing listens on the port: QEMU is not forwarding it"
SILENT = "no answer came: the guest is still booting, or its network is down"
REFUSED = "the guest refused the connection: its SSH server is not up yet or broken"

FIRST_S, LEAST_S = 1.0, 0.4
SHARE = 6
"""Connect again after 1/SHARE of the time waited so far, which bounds the time lost to that fraction."""
NETWORK_UP_S = 4.0
"""Replaces LEAST_S once the guest's kernel has refused a connection: its network is up and loses no more packets."""
MAX_OPEN = 8
PAUSE_S = 0.1
ALIVE_EVERY_S = 0.5


def read(port: int, timeout_s: float) -> str:
    """Read the first line of the server behind a loopback port. Returns CLOSED, or '' if the server stays silent.

    QEMU closes the connection when the guest's kernel refuses it, so CLOSED proves that the kernel works.
    """
    with contextlib.suppress(TimeoutError):
        try:
            with socket.create_connection((HOST, port), timeout=timeout_s) as sock:
                data = sock.recv(255)
        except ConnectionError:
            data = b""
        return data.split(b"\n")[0].decode(errors="replace").strip() if data else CLOSED
    return ""


def network_unknown() -> None:
    """The default for `network`: whether the guest's network is up is not known."""


def wait(
    port: int, *, timeout_s: float, alive: Callable[[], bool], network: Callable[[], bool | None] = network_unknown
) -> str:
    """Wait for the banner of an SSH server. Returns '' once it has come, else the last state of the port.

    QEMU accepts at once, whatever the guest does. The first packet to a guest whose network is down is lost and resent
    only after 6 s, 12 s and so on, even after we have closed the connection. A new connection is quicker, but each one
    costs the guest a server process in the end. So the intervals grow, and earlier connections stay open, because a
    guest may be slow. `alive` is polled; the wait ends when it returns False.

    `network` returns whether the guest's network card is up. No connection is made while it returns False.
    """
    began = asked = due = time.monotonic()
    first, least_s, stage = 0.0, LEAST_S, SILENT
    with _Attempts(port) as attempts:
        while True:
            now = time.monotonic()
            if now >= due and network() is False:
                due = now + PAUSE_S
            elif now >= due:
                made, first = attempts.connect(), first or now
                stage = stage if made else NO_LISTENER
                due = max(first + FIRST_S, now + max(least_s, (now - first) / SHARE)) if made else now + PAUSE_S
            for said in attempts.listen(PAUSE_S):
                if said.startswith("SSH-"):
                    return ""
                stage = said if said in (NO_LISTENER, REFUSED) else f"another server answers: {said.strip()!r}"
                due, least_s = time.monotonic() + PAUSE_S, NETWORK_UP_S
            if now - began > timeout_s:
                return stage
            if now - asked > ALIVE_EVERY_S:
                asked = now
                if not alive():
                    return stage


class _Attempts:
    """Connections without a banner so far, oldest first."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [*self._open]:
            self._drop(sock)
        self._selector.close()

    def connect(self) -> bool:
        """Open one more connection; drop the oldest beyond MAX_OPEN. False if nothing listens on the port."""
        sock = socket.socket()
        sock.settimeout(0)
        if sock.connect_ex((HOST, self._port)) not in (0, errno.EINPROGRESS):
            sock.close()
            return False
        self._selector.register(sock, selectors.EVENT_READ, sock)
        self._open.append(sock)
        if len(self._open) > MAX_OPEN:
            self._drop(self._open[0])
        return True

    def listen(self, timeout_s: float) -> Iterator[str]:
        """Yield the first bytes that servers sent; NO_LISTENER or REFUSED for a connection that was closed."""
        for key, _ in self._selector.select(timeout_s):
            sock: socket.socket = key.data
            try:
                said = sock.recv(255).decode(errors="replace") or REFUSED
            except ConnectionRefusedError:
                said = NO_LISTENER
            except OSError:
                said = REFUSED
            self._drop(sock)
            yield said

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._open.remove(sock)
        sock.close()
