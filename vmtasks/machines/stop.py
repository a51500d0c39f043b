"""The stop ladder: power off in the guest, ACPI button, QMP quit, SIGTERM, SIGKILL; each with a deadline."""

from contextlib import suppress

import msgspec

from vmtasks.errors import MachineError, SshError, VmTasksError
from vmtasks.guest import connect, ssh
from vmtasks.host import progress
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines.folder import Place
from vmtasks.qemu import argv, qmp, vm

POWEROFF_S = 15.0
GENTLE = ("power off in the guest", "ACPI power button")
"""Rungs after which the guest's file systems are clean. Every other rung is a power cut."""
AT_REST = "already stopped"


def stop(place: Place, record: MachineRecord | None, *, gentle: bool = True, timeout_s: float | None = None) -> str:
    """Stop the machine down the ladder, and record that it is stopped. Returns the rung that was needed.

    Each gentle rung has `timeout_s`, by default the time that the guest needs on this host. Without a readable record
    the process is found by QEMU's command line, or behind its socket. MachineError for a process that is not ours, or
    does not exit.
    """
    pid, rung = place.process(), AT_REST
    if pid is not None:
        first = rungs(place, record, timeout_s) if gentle and resume_if_paused(place) else []
        rung = vm.stop(pid, argv.PROGRAM, first, place.qmp)
        late = gentle and rung not in (*GENTLE, AT_REST)
        why = ": the guest did not power off; for it, power was cut" if late else ""
        progress.say(f"machine {place.name} stopped ({rung}){why}")
    elif vm.end_stray(place.qmp):
        rung = "QMP quit"
        progress.say(f"machine {place.name} stopped ({rung}), although no process of it was found")
    if (record is None or record.pid) and rung not in GENTLE:
        place.crashed.touch()
    _tidy(place, record)
    return rung


def end_stray(place: Place) -> None:
    """End a QEMU without a record: its starter was killed before it wrote one.

    MachineError for a QEMU that is not ours.
    """
    pid = place.process()
    if pid is not None:
        vm.stop(pid, argv.PROGRAM, [], place.qmp)
    vm.end_stray(place.qmp)


def _tidy(place: Place, record: MachineRecord | None) -> None:
    """Remove the files of a running machine, and record that it is stopped."""
    if record is not None:
        ssh.close(place.target(record))
    elif place.qmp.exists() and vm.has_listener(place.qmp):
        raise MachineError(
            f"machine {place.name}: another process serves {place.qmp} and does not exit; nothing was removed",
            hint="find the process that has it open (fuser), and end it",
        )
    for leftover in (place.pidfile, place.folder / f"{place.name}.ports"):
        leftover.unlink(missing_ok=True)
    for socket in (*place.sockets.glob("ssh-*"), place.qmp, place.serial):
        socket.unlink(missing_ok=True)
    if record is not None:
        now = place.record() or record
        place.write(msgspec.structs.replace(now, pid=0, pid_started="", ready=False))


def resume_if_paused(place: Place) -> bool:
    """Resume a paused guest; returns whether it can power off: not after a panic or with a full disk."""
    state = place.stuck_state()
    if state == qmp.FULL:
        with suppress(MachineError):
            place.resume_if_full()
            state = ""
    if state == "paused":
        with suppress(MachineError):
            vm.control(place.qmp, "cont")()
    elif state:
        progress.say(f"machine {place.name} cannot power off: {qmp.STUCK[state]}")
        return False
    return True


def rungs(place: Place, record: MachineRecord | None, timeout_s: float | None) -> list[vm.Rung]:
    """The rungs that let the guest unmount its file systems. Reports why one is skipped."""
    try:
        factor = place.state.accel.factor
    except VmTasksError as error:  # stop it nevertheless
        progress.say(f"machine {place.name}: {error.message}")
        factor = 1.0
    wait_s = POWEROFF_S * factor if timeout_s is None else timeout_s
    button_s = wait_s / 2 if timeout_s is None else wait_s
    button = (GENTLE[1], vm.control(place.qmp, "system_powerdown"), button_s)
    if record is None:
        return [button]
    target = place.target(record)

    def power_off() -> bool:
        try:
            connection = connect.connect(target, timeout_s=min(connect.READY_S, wait_s))
        except SshError:
            return False
        with connection, suppress(SshError):  # the power-off may break the connection
            connection.execute(place.config.guest.poweroff, cwd="/", user="root", timeout_s=wait_s)
        return True

    return [(GENTLE[0], power_off, wait_s), button]
