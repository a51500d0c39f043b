"""Is this machine alive, and if not, what is wrong? Layer by layer, true also for a forwarded loopback port.

A connection to the port proves nothing, and neither does a ping: QEMU answers for a guest whose CPU is stopped.
"""

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vmtasks.errors import SshError, VmTasksError
from vmtasks.remote import client
from vmtasks.remote.client import Console
from vmtasks.remote.ssh import Target

Verdict = Literal["ready", "ssh", "no-ssh", "silent", "paused", "panicked", "gone"]

PAUSED = ("paused", "suspended", "save-vm", "postmigrate", "prelaunch", "inmigrate", "finish-migrate")
PANICKED = ("guest-panicked",)
SAYS: dict[Verdict, str] = {
    "ready": "an authenticated `true` succeeded",
    "ssh": "an SSH server answers, but nobody can log in",
    "no-ssh": "the guest's kernel answers, but no SSH server does",
    "silent": "nothing answers in the guest: it boots, or hangs",
    "paused": "the guest's CPU is stopped",
    "panicked": "the guest's kernel has panicked",
    "gone": "QEMU does not run",
}


@dataclass(frozen=True)
class Alive:
    """What is known: `reasons` holds what each layer that was asked has said: process, qmp, ssh, banner."""

    verdict: Verdict
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether the guest's operating system works, be it without SSH."""
        return self.verdict in ("ready", "ssh", "no-ssh")

    def __str__(self) -> str:
        """The verdict in a sentence."""
        return SAYS[self.verdict]


def is_alive(
    target: Target,
    *,
    timeout_s: float = 10.0,
    process: Callable[[], bool] | None = None,
    qmp_status: Callable[[], str] | None = None,
    console: Console | None = None,
) -> Alive:
    """Ask a machine, each layer for at most `timeout_s`, the cheapest proof first; stops as soon as one is enough.

    `process` says whether QEMU runs, `qmp_status` what QMP's query-status calls the state of the machine; both are left
    out for a machine that is not ours, for which paused, panicked and silent look alike.
    """
    reasons: dict[str, str] = {}
    if process is not None:
        runs = process()
        reasons["process"] = "QEMU runs" if runs else "QEMU does not run"
        if not runs:
            return Alive("gone", reasons)
    state = ""
    if qmp_status is not None:
        try:
            state = qmp_status()
        except (VmTasksError, OSError) as error:
            state = f"no answer ({error})"
        reasons["qmp"] = state
    if state in PAUSED:
        return Alive("paused", reasons)
    if state in PANICKED:
        return Alive("panicked", reasons)
    return _by_network(target, timeout_s, reasons, console)


def _by_network(target: Target, timeout_s: float, reasons: dict[str, str], console: Console | None) -> Alive:
    try:
        with client.connect(target, timeout_s=timeout_s, console=console) as connection:
            done = connection.execute("true", timeout_s=timeout_s)
            reasons["ssh"] = f"`true` ended with status {done.status}"
            return Alive("ready" if done.status == 0 else "ssh", reasons)
    except SshError as error:
        reasons["ssh"] = error.message
    said = banner(target.port, timeout_s)
    reasons["banner"] = said or "nothing"
    if said.startswith("SSH-"):
        return Alive("ssh", reasons)
    if said == REFUSED and "process" not in reasons:
        return Alive("gone", reasons)
    return Alive("no-ssh" if said == CLOSED else "silent", reasons)


CLOSED = "closed before a word"
REFUSED = "connection refused"


def banner(port: int, timeout_s: float) -> str:
    """The first line of the server behind a loopback port, CLOSED, REFUSED, or nothing when it stays silent.

    QEMU closes the connection when the guest's kernel refuses it: that is the kernel's word, so that it works.
    """
    with contextlib.suppress(TimeoutError):
        try:
            with socket.create_connection((client.HOST, port), timeout=timeout_s) as sock:
                data = sock.recv(255)
        except ConnectionRefusedError:
            return REFUSED
        except ConnectionError:
            data = b""
        return data.split(b"\n")[0].decode(errors="replace").strip() if data else CLOSED
    return ""
