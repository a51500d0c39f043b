"""Is this machine alive, and if not, what is wrong? Probes one layer after the other, also through a forwarded port.

Neither a connection to the port nor a ping proves anything: QEMU answers for a guest whose CPU is stopped. A layer is
probed only if all layers below it passed. The first layer that fails is the cause and gives the verdict.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmtasks.errors import SshError
from vmtasks.guest import banner, connect
from vmtasks.guest.banner import HOST
from vmtasks.guest.ssh import Console, Target
from vmtasks.qemu import qmp

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection

Diagnosis = Literal["ready", "ssh", "no-ssh", "silent", "paused", "panicked", "gone", ""]

DESCRIPTIONS: dict[Diagnosis, str] = {
    "ready": "an authenticated `true` succeeded",
    "ssh": "an SSH server answers, but login fails",
    "no-ssh": "the guest's kernel answers, but no SSH server does",
    "silent": "nothing answers in the guest: it is booting, or hangs",
    "paused": "the guest's CPU is stopped",
    "panicked": "the guest's kernel has panicked",
    "gone": "QEMU is not running, or no longer listens",
}

Probe = Callable[[], tuple[Diagnosis, str]]
"""Probes one layer. Returns the diagnosis, '' if the layer passed, and a sentence about it."""


@dataclass(frozen=True)
class Layer:
    """One layer. `passed` is None if the layer was not probed because one below it failed."""

    name: str
    passed: bool | None
    says: str
    verdict: Diagnosis = ""


@dataclass(frozen=True)
class Alive:
    """The state of a machine, and the layers that prove it."""

    verdict: Diagnosis
    layers: tuple[Layer, ...]

    @property
    def alive(self) -> bool:
        """Whether the guest's operating system works, with or without SSH."""
        return self.verdict in ("ready", "ssh", "no-ssh")

    @property
    def reason(self) -> str:
        """The layer that failed, with its message, or ''."""
        return next((f"{layer.name}: {layer.says}" for layer in self.layers if layer.passed is False), "")

    def __str__(self) -> str:
        """The verdict as a sentence, with the reason."""
        return ": ".join(filter(None, (DESCRIPTIONS[self.verdict], self.reason)))


def is_alive(
    target: Target,
    *,
    timeout_s: float = 10.0,
    process: Callable[[], bool] | None = None,
    control: Path | None = None,
    console: "Console | None" = None,
) -> Alive:
    """Probe a machine, each layer for at most `timeout_s`.

    `process` returns whether QEMU runs; `control` is its QMP socket. Omit both for a machine of another owner: paused,
    panicked and silent are then all reported as silent.
    """
    probes: dict[str, Probe] = {}
    if process is not None:
        probes["process"] = lambda: ("", "QEMU runs") if process() else ("gone", "QEMU is not running")
    if control is not None:
        probes["QMP"] = lambda: probe_cpu(control)
    return diagnose(run_probes(probes | network_probes(target, timeout_s, console)))


def diagnose(layers: Iterable[Layer]) -> Alive:
    """Take the verdict from the layer that failed."""
    seen = tuple(layers)
    return Alive(next((layer.verdict for layer in seen if layer.passed is False), "ready"), seen)


def run_probes(probes: Mapping[str, Probe]) -> Iterator[Layer]:
    """Probe one layer after the other, up to the first that fails."""
    failed = ""
    for name, probe in probes.items():
        if failed:
            yield Layer(name, None, f"not probed, because {failed} failed")
            continue
        verdict, says = probe()
        yield Layer(name, not verdict, says, verdict)
        failed = name if verdict else ""


# -- the layers


def probe_cpu(control: Path) -> tuple[Diagnosis, str]:
    """Ask QEMU for the state of the guest's CPU."""
    state = qmp.status(control)
    if not state:
        return "silent", "QEMU does not answer on its control socket: it hangs, or another process holds the socket"
    if state == "running":
        return "", "QEMU says running"
    return ("panicked" if state == qmp.PANICKED else "paused"), f"{state}: {qmp.STUCK.get(state, 'see QEMU')}"


def network_probes(target: Target, timeout_s: float, console: "Console | None" = None) -> dict[str, Probe]:
    """The probes from the port to a command in the guest, each for at most `timeout_s`."""
    opened: list[Connection] = []

    def port() -> tuple[Diagnosis, str]:
        where = f"{HOST}:{target.port}"
        try:
            with socket.create_connection((HOST, target.port), timeout_s):
                return "", f"{where} is forwarded by QEMU; that proves nothing about the guest"
        except OSError as error:
            return "gone", f"{where} accepts no connection ({error})"

    def server() -> tuple[Diagnosis, str]:
        said = banner.read(target.port, timeout_s)
        if said.startswith("SSH-"):
            return "", said
        how = said or "nothing behind the port answers"
        return ("no-ssh" if said else "silent"), f"no SSH server answers in the guest ({how})"

    def login() -> tuple[Diagnosis, str]:
        try:
            opened.append(connect.connect(target, timeout_s=timeout_s, console=console))
        except SshError as error:
            return "ssh", error.message
        return "", f"{target.user} logs in with {target.key}"

    def command() -> tuple[Diagnosis, str]:
        began = time.monotonic()
        try:
            with opened.pop() as connection:
                done = connection.execute("true", timeout_s=timeout_s)
        except SshError as error:
            return "ssh", error.message
        says = f"`true` exited with status {done.status} after {(time.monotonic() - began) * 1000:.0f} ms"
        return ("ssh" if done.status else ""), says

    return {"port": port, "banner": server, "authentication": login, "command": command}
