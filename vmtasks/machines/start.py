"""Start a machine's QEMU on a free port, and wait until it accepts a login or has failed to boot."""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from vmtasks.config.arguments import Forward
from vmtasks.config.load import FALLBACK_PORTS, show_size
from vmtasks.errors import BindError, MachineError, SshError, VmTasksError, note_failure
from vmtasks.guest import connect, ssh
from vmtasks.host import files, process, progress
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import binds, identity, keys, stop
from vmtasks.machines.folder import Place
from vmtasks.qemu import argv, hardware, qmp, vm
from vmtasks.qemu.argv import Share, Spec
from vmtasks.qemu.console import read_log
from vmtasks.qemu.events import Events
from vmtasks.qemu.ports import port_free, port_holder

if TYPE_CHECKING:
    from vmtasks.guest.client import Connection

FIRST_PORT = 2222
ANY_PORT = 0
"""The kernel picks a free port; QEMU reports it."""
CPU_EVERY_S = 3.0
LOGIN_S = 10.0
NETWORK_S = 20.0
"""How long a virtio card counts as down unless its driver reports it up."""
REACH_AGAIN_S = 30.0
"""The time limit for a machine that has accepted a login before."""


def boot(place: Place, record: MachineRecord, *, die_with_us: bool = False) -> ssh.Target:
    """Start a machine: QEMU, SSH, its own identity and binds. On failure nothing is left running."""
    require_keys(place, record)
    config, accel = place.config, place.state.accel
    history, key = place.state.store.history, f"start {config.label}"
    with progress.step(f"start {place.name}", expected_s=history.expected_s(key)) as step:
        step.now(f"boot ({accel.name}, {config.cpus} CPU, {show_size(config.memory)})")
        begins = place.console_log.stat().st_size if place.console_log.exists() else 0
        record = start_qemu(place, record, die_with_us=die_with_us)
        try:
            target = personalize(place, *reach(place, record, begins))
        except BaseException as error:
            stuck = place.stuck_state()
            _end(place, record, error)
            if not isinstance(error, VmTasksError) or isinstance(error, BindError):  # not a failure of the boot
                raise
            hint = error.hint if record.image else "doit install --disk: log in there and run key.sh from the CD"
            if stuck == qmp.FULL:
                hint = f"its disk could not be written: free some space in {place.folder}"
            said = tuple(read_log(place.console_log, begins).tail())
            raise error.replace(console=said, log=place.console_log, hint=hint) from error
    history.record(key, step.elapsed_s)
    return target


def wait(place: Place, record: MachineRecord) -> ssh.Target:
    """Wait for a machine whose QEMU runs, and personalize it if needed. SshError or BindError with the reason."""
    return personalize(place, *reach(place, record))


# -- the three steps


def start_qemu(place: Place, record: MachineRecord, *, die_with_us: bool = False) -> MachineRecord:
    """Start QEMU, and record its process and ports; the guest has yet to boot. Returns the record.

    On failure nothing is left running. MachineError with QEMU's message, or for a taken port.
    """
    config, record = place.config, binds.decide_copied(place, record)
    place.make_folder()
    place.open_sockets()
    stop.end_stray(place)
    for old in (*place.sockets.glob("ssh-*"), place.qmp, place.serial):
        old.unlink(missing_ok=True)
    pid, port, forwards = launch(place, record, die_with_us=die_with_us)
    try:
        return place.write(
            msgspec.structs.replace(
                record,
                pid=pid.number,
                pid_started=pid.started,
                ssh_port=port,
                forwards=[*map(str, forwards)],
                want_forwards=[*map(str, requested_forwards(record))],
                memory=config.memory,
                cpus=config.cpus,
                accel=place.state.accel.name,
                network=config.network,
                started=round(time.time(), 1),
                ready=False,
            )
        )
    except BaseException as error:
        _end(place, record, error)
        raise


def reach(place: Place, record: MachineRecord, console_from: int = 0) -> "tuple[MachineRecord, Connection]":
    """Wait until SSH accepts a login. Returns the record and the connection.

    SshError with the reason, from SSH or the console.

    Records the host keys of a machine that was installed by hand, once: no other host is between us and a port that our
    own QEMU forwards.
    """
    require_keys(place, record)
    deadline_s = place.config.guest.ssh.ready_timeout_s * place.state.accel.factor
    if record.ready:
        deadline_s = min(deadline_s, REACH_AGAIN_S)
    watch, up = BootWatch(place, record, console_from), network_probe(place, record)
    if not record.host_keys:
        learned = ssh.scan_host_keys(record.ssh_port, timeout_s=deadline_s, alive=watch, network=up)
        record = place.write(msgspec.structs.replace(record, host_keys=learned))
        deadline_s = LOGIN_S  # its server answers, so a login must succeed soon
    target = place.target(record)
    place.open_sockets()
    ssh.write_config(target)
    write_state_files(place, record)
    return record, connect.wait(target, timeout_s=deadline_s, alive=watch, network=up)


def personalize(place: Place, record: MachineRecord, connection: "Connection") -> ssh.Target:
    """Install a machine's own keys, host name and binds, and mark it ready. SshError or BindError.

    Can be repeated: completed parts are skipped. Closes the connection.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        record, connection = identity.personalize(place, record, connection)
        stack.enter_context(connection)
        record = binds.mount(place, connection, record)
    place.write(msgspec.structs.replace(record, ready=True))
    return place.target(record)


def _end(place: Place, record: MachineRecord, error: BaseException) -> None:
    """End the QEMU of a start that failed with `error`."""
    with progress.observing(progress.Observer()):
        end = partial(stop.stop, place, record, gentle=False)
        note_failure(error, end, f"machine {place.name} could not be stopped")


# -- whether it can boot


def require_keys(place: Place, record: MachineRecord) -> None:
    """StateError for an unusable private key: fail early instead of waiting for a login."""
    target = place.target(record)
    for key in (target.key, *target.extra_keys):
        store = key == place.state.key
        other = f"put it back from a copy; without one: vmtasks rm {place.name}"
        again = "put it back from a copy, or remove both files: the images that authorize the key are then rebuilt"
        keys.require_usable(key, place.state.public_key if store else None, again if store else other)


@dataclass
class BootWatch:
    """Whether a machine can still boot; called between attempts of SSH. Raises SshError if not."""

    place: Place
    record: MachineRecord
    console_from: int = 0
    patient: bool = False
    """Tolerate a paused machine that was up before: it may be resumed."""
    cpu_asked: float = 0.0

    def __call__(self) -> bool:
        """False if its process has ended."""
        self.check_console()
        if time.monotonic() - self.cpu_asked > CPU_EVERY_S:
            self.cpu_asked = time.monotonic()
            state = qmp.status(self.place.qmp)
            stuck = qmp.STUCK.get(state)
            if stuck is not None and not (self.patient and state == "paused"):
                raise SshError(f"machine {self.place.name}: {stuck}", hint=self.place.remedy(state))
        return self.place.pid(self.record) is not None

    def check_console(self) -> None:
        """SshError if the console shows a failed boot: fail before the deadline."""
        transcript = read_log(self.place.console_log, self.console_from)
        for failure in self.place.config.guest.failures:
            if failure.cause != "login" and transcript.match(failure.expect):
                raise SshError(f"machine {self.place.name}: the guest {failure.says}")


def network_probe(place: Place, record: MachineRecord) -> Callable[[], bool | None]:
    """A function that returns whether the network of a booting guest is up; None if unknown.

    Returns False for NETWORK_S at most, because not every driver reports that it is up.
    """
    events, virtio = Events(place.events), place.config.guest.machine.nic.startswith("virtio")

    def up() -> bool | None:
        if events.network_up():
            return True
        return False if virtio and time.time() - record.started < NETWORK_S else None

    return up


# -- ports


def launch(place: Place, record: MachineRecord, *, die_with_us: bool) -> tuple[vm.Pid, int, list[Forward]]:
    """Start QEMU; returns its process, its SSH port and its forwards, with the ports that QEMU has chosen.

    SSH is on the requested port, or by default on the first free one of 2222 and the fallback range, or else on any.
    """
    want = record.want_port if record.own else place.config.ssh_port
    for port in [want] if want else [*filter(port_free, (FIRST_PORT, *FALLBACK_PORTS)), ANY_PORT]:
        try:
            key = (place.key_cd,) if place.key_cd.is_file() else ()
            pid = vm.launch(qemu_spec(place, record, port, cds=key), place.qemu_log, die_with_us=die_with_us)
        except MachineError as error:
            taken = vm.port_taken(error)
            if taken is None:
                raise
            if taken != port:
                raise forward_taken(taken) from None
        else:
            try:
                ssh_forward, *forwards = resolve(
                    place, [Forward(port, argv.GUEST_SSH_PORT), *requested_forwards(record)]
                )
            except BaseException:
                vm.end_stray(place.qmp)
                raise
            return pid, ssh_forward.host, forwards
    raise ssh_port_taken(want or ANY_PORT, own=record.own)


def requested_forwards(record: MachineRecord) -> list[Forward]:
    """The forwards as requested. Records of earlier versions hold only the resulting ones."""
    return [Forward.parse(text) for text in record.want_forwards or record.forwards]


def ssh_port_taken(port: int, *, own: bool) -> MachineError:
    """The error for a taken SSH port: names its holder and another port."""
    free = next((p for p in FALLBACK_PORTS if p != port and port_free(p)), "auto")
    offer = f"vmtasks run --ssh-port {free}" if own else f"doit port={free} start"
    hint = offer if free == "auto" or own else f"{offer}, or port=auto"
    return MachineError(f"port {port} is taken{held_by(port)}", hint=hint)


def forward_taken(port: int) -> MachineError:
    """The error for a taken host port of `-p`."""
    free = next((p for p in range(port + 1, port + 100) if p <= 65535 and port_free(p)), None)
    hint = f"-p {free}:GUEST" if free else "choose another port for this host's side"
    return MachineError(f"port {port}, the host's side of a forward, is taken{held_by(port)}", hint=hint)


def held_by(port: int) -> str:
    """` by name (pid N)`, or '' if unknown."""
    holder = port_holder(port)
    return f" by {holder}" if holder else ""


def resolve(place: Place, forwards: list[Forward]) -> list[Forward]:
    """The forwards, with the ports that QEMU has chosen for requests of any free port."""
    if all(forward.host for forward in forwards):
        return forwards
    with qmp.connect(place.qmp, timeout_s=5) as control:
        table = str(control.cmd("human-monitor-command", **{"command-line": "info usernet"}))
    chosen = re.findall(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)", table)
    found: list[Forward] = []
    for forward in forwards:
        known = {known.host for known in [*forwards, *found]}
        ports = [int(host) for host, guest in chosen if int(guest) == forward.guest and int(host) not in known]
        if not forward.host and not ports:
            raise MachineError(f"QEMU does not say which port leads to the guest's {forward.guest}", log=place.qemu_log)
        found.append(forward if forward.host else Forward(ports[0], forward.guest))
    return found


# -- the QEMU


def qemu_spec(place: Place, record: MachineRecord, port: int, **more: Any) -> Spec:
    """The specification of the machine's QEMU."""
    return hardware.spec(
        place.config,
        place.state.accel,
        name=place.name,
        disk=place.disk.absolute(),
        network=place.config.network,
        ssh_port=port,
        forwards=tuple((forward.host, forward.guest) for forward in requested_forwards(record)),
        shares=tuple(
            Share(f"bind{number}", bind.host, read_only=bind.read_only)
            for number, bind in enumerate(record.binds)
            if not bind.copied
        ),
        mac=record.mac,
        console_socket=place.serial,
        console_log=place.console_log.absolute(),
        qmp_socket=place.qmp,
        events=place.events.absolute(),
        pidfile=place.pidfile,
        **more,
    )


def write_state_files(place: Place, record: MachineRecord) -> None:
    """Write the state files that scripts expect: ports, and links to the sockets in their short folder."""
    forwards = map(Forward.parse, record.forwards)
    rows = [("ssh", record.ssh_port), *((str(forward.guest), forward.host) for forward in forwards)]
    files.write(place.folder / f"{place.name}.ports", "".join(f"{what},{port}\n" for what, port in rows))
    places = {
        f"{place.name}-monitor.socket": "qmp",
        f"{place.name}-serial.socket": "serial",
        "ssh_config": "ssh_config",
    }
    for name, socket_name in places.items():
        link = place.folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(place.sockets / socket_name)


def on_terminal(place: Place, record: MachineRecord, display: str, **more: Any) -> int:
    """Run the machine in the foreground with its console here; returns QEMU's status."""
    place.open_sockets()
    port = place.config.ssh_port or next(filter(port_free, (FIRST_PORT, *FALLBACK_PORTS)), ANY_PORT)
    return process.run_attached(argv.on_terminal(qemu_spec(place, record, port, **more), display))
