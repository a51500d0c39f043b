"""What a machine is doing now, found out without a login where that can be known otherwise."""

from dataclasses import dataclass
from typing import Literal

from vmtasks.guest import banner, connect
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines.folder import Place
from vmtasks.qemu import qmp

ANSWER_S = 10.0
"""A server in an emulated guest may take seconds for its first word while others use the CPU."""

Status = Literal["absent", "booting", "damaged", "running", "unreachable", "paused", "panicked", "stale", "stopped"]
"""`damaged`: its record cannot be read, so that only `stop` and `rm` work. `unreachable`: SSH has answered since the
start and does not now. `paused`: its CPU stands, whoever stopped it."""


@dataclass(frozen=True)
class MachineState:
    """A machine as `status` shows it. `pid` and `ssh_port` are 0 and `ssh` is empty unless it runs."""

    name: str
    status: Status
    record: MachineRecord | None
    pid: int = 0
    ssh_port: int = 0
    ssh: str = ""
    """The line that logs in."""
    fault: str = ""
    """Why its record cannot be read."""


def read_state(place: Place) -> MachineState:
    """What the machine is doing now. Takes no lock and waits a few seconds at most."""
    record = place.state.machine(place.name)
    if record is None:
        fault = place.fault()
        return MachineState(place.name, "damaged" if fault else "absent", None, fault=fault)
    if place.pid(record) is None:
        return MachineState(place.name, "stale" if record.pid else "stopped", record)
    return MachineState(place.name, _running(place, record), record, record.pid, record.ssh_port, place.ssh_line())


def _running(place: Place, record: MachineRecord) -> Status:
    """What a machine is doing whose QEMU runs. Its CPU is asked first: SSH would only keep silent.

    One that has let us in since it was started is up when its SSH server speaks, which costs no login. Silence proves
    nothing: a server that is busy with others may refuse one more.
    """
    if state := place.stuck_state():
        return "panicked" if state == qmp.PANICKED else "paused"
    if record.ready and banner.read(record.ssh_port, ANSWER_S).startswith("SSH-"):
        return "running"
    if connect.is_ready(place.target(record)):
        return "running"
    return "unreachable" if record.ready else "booting"
