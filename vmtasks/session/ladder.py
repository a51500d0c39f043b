"""The stop ladder: power off in the guest, ACPI button, QMP quit, SIGTERM, SIGKILL; each with a deadline."""

from contextlib import suppress

import msgspec

from vmtasks import proc
from vmtasks.errors import MachineError
from vmtasks.machine import qmp, vm
from vmtasks.machine.events import Events
from vmtasks.progress import Say
from vmtasks.remote import ssh
from vmtasks.session.place import Place
from vmtasks.state import MachineRecord

POWEROFF_S = 15.0
GENTLE = ("power off in the guest", "ACPI power button")
"""Rungs after which the guest's file systems are whole. Any other end is a power cut for them."""
AT_REST = "already stopped"


def stop(place: Place, record: MachineRecord, note: Say, *, gentle: bool = True, timeout_s: float | None = None) -> str:
    """Down the ladder; afterwards the record says that the machine is at rest. Returns the rung that was needed.

    Each gentle rung has `timeout_s`, by default what the guest needs on this host.
    """
    pid, rung = place.pid(record), AT_REST
    if pid is not None:
        first = rungs(place, record, timeout_s) if gentle and roused(place, note) else []
        rung = vm.stop(pid, str(place.qmp), first, place.qmp)
        late = gentle and rung not in (*GENTLE, AT_REST)
        why = ": the guest did not power off, as if its power was cut" if late else ""
        note(f"machine {place.name} stopped ({rung}){why}")
    elif vm.end_stray(place.qmp):
        rung = "QMP quit"
        note(f"machine {place.name} stopped ({rung}): whoever started it was killed before it was recorded")
    if record.pid and rung not in GENTLE:
        place.crashed.touch()
    ssh.close(place.target(record))
    for leftover in (f"{place.name}.pid", f"{place.name}.ports"):
        (place.folder / leftover).unlink(missing_ok=True)
    for socket in (*place.sockets.glob("ssh-*"), place.qmp, place.serial):
        socket.unlink(missing_ok=True)
    now = place.record() or record
    place.write(msgspec.structs.replace(now, pid=0, pid_started="", ready=False))
    return rung


def roused(place: Place, note: Say) -> bool:
    """Whether the guest can power off: not one that panicked or whose disk is full. One that was paused goes on."""
    state = qmp.status(place.qmp) if Events(place.events).stands() else "running"
    if state == "paused":
        with suppress(MachineError):
            vm.control(place.qmp, "cont")()
    elif state in qmp.STUCK:
        note(f"machine {place.name} cannot power off: {qmp.STUCK[state]}")
        return False
    return True


def rungs(place: Place, record: MachineRecord, timeout_s: float | None) -> list[vm.Rung]:
    """The rungs that let the guest put its file systems in order."""
    target, factor = place.target(record), place.state.accel.factor
    inside = ssh.script(place.config.guest.poweroff, cwd="/", env={}, user="root")
    wait_s = POWEROFF_S * factor if timeout_s is None else timeout_s

    def power_off() -> bool:
        reached = ssh.is_ready(target)
        if reached:
            proc.run(target.argv(ssh.remote_line(inside)), timeout_s=min(20, wait_s), check=False)
        return reached

    button_s = wait_s / 2 if timeout_s is None else wait_s
    return [(GENTLE[0], power_off, wait_s), (GENTLE[1], vm.control(place.qmp, "system_powerdown"), button_s)]
