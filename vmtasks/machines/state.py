"""A machine's state now, determined without a login where possible."""

from dataclasses import dataclass
from typing import Literal

from vmtasks.guest import banner, connect
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines.folder import Place
from vmtasks.qemu import qmp

ANSWER_S = 10.0
"""A server in an emulated guest may take seconds to send its banner on a busy host."""

Status = Literal["absent", "booting", "damaged", "running", "unreachable", "paused", "panicked", "stale", "stopped"]
"""`damaged`: its record cannot be read, so only `stop` and `rm` work. `unreachable`: SSH has answered since the start,
but does not now. `paused`: its CPU is stopped, for whatever reason."""


@dataclass(frozen=True)
class MachineState:
    """A machine as `status` shows it. `pid` and `ssh_port` are 0 and `ssh` is '' unless it runs."""

    name: str
    status: Status
    record: MachineRecord | None
    pid: int = 0
    ssh_port: int = 0
    ssh: str = ""
    """The command line that logs in."""
    fault: str = ""
    """Why its record cannot be read, or ''."""


def read_state(place: Place) -> MachineState:
    """Determine the machine's state. Takes no lock and waits a few seconds at most."""
    record = place.state.machine(place.name)
    if record is None:
        fault = place.fault()
        return MachineState(place.name, "damaged" if fault else "absent", None, fault=fault)
    if place.pid(record) is None:
        return MachineState(place.name, "stale" if record.pid else "stopped", record)
    return MachineState(place.name, _running(place, record), record, record.pid, record.ssh_port, place.ssh_line())


def _running(place: Place, record: MachineRecord) -> Status:
    """The status of a machine whose QEMU runs. Checks the CPU first: with a stopped CPU, SSH would only be silent.

    After a successful login since its start, a machine is up if its SSH server sends a banner: no login needed.
    Silence proves nothing, because a busy server may refuse one more connection.
    """
    if state := place.stuck_state():
        return "panicked" if state == qmp.PANICKED else "paused"
    if record.ready and banner.read(record.ssh_port, ANSWER_S).startswith("SSH-"):
        return "running"
    if connect.is_ready(place.target(record)):
        return "running"
    return "unreachable" if record.ready else "booting"
