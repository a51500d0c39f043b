"""Where a machine, or this host, stands: one layer after the other, each passed or failed with the reason.

A layer is looked at only if those below it passed: what fails first is why the rest cannot work.
"""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmtasks import proc, progress
from vmtasks.config import FALLBACK_PORTS, Config
from vmtasks.errors import MissingToolError, VmTasksError
from vmtasks.machine.console import read_log
from vmtasks.machine.ports import port_free, port_holder
from vmtasks.remote import ssh
from vmtasks.session import launch
from vmtasks.session.machine import Machine
from vmtasks.state import MachineRecord, State

PORT_S, BANNER_S, LOGIN_S = 3.0, 10.0, 25.0
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "rsync", "ssh", "scp", "ssh-keygen", "ssh-keyscan")
LEAST_FREE = 2 << 30


@dataclass(frozen=True)
class Layer:
    """One layer: `passed` is None when it was not looked at, because one below it failed."""

    name: str
    passed: bool | None
    says: str


Look = Callable[[Machine, MachineRecord], tuple[bool, str]]


def machine_layers(machine: Machine) -> Iterator[Layer]:
    """The layers of a machine, from its record to a command in the guest. Takes at most a minute."""
    record = machine.record()
    if record is None:
        yield Layer("record", passed=False, says=f"there is no machine {machine.name}")
        return
    yield Layer("record", passed=True, says=f"{record.guest}:{record.snapshot}, in {machine.folder}")
    failed = ""
    for name, look in LAYERS.items():
        if failed:
            yield Layer(name, None, f"not looked at, because {failed} failed")
            continue
        passed, says = look(machine, record)
        yield Layer(name, passed, says)
        failed = "" if passed else name


def verdict(machine: Machine) -> str:
    """The first layer that fails, with its reason; empty when the machine is well."""
    return next((f"{layer.name}: {layer.says}" for layer in machine_layers(machine) if layer.passed is False), "")


# -- the layers


def _process(machine: Machine, record: MachineRecord) -> tuple[bool, str]:
    if machine.pid(record) is not None:
        return True, f"QEMU is process {record.pid}, up {progress.seconds(time.time() - record.started)}"
    if not record.pid:
        return False, f"it is stopped; {machine.command('start')}"
    said = machine.qemu_log.read_text(errors="replace").strip() if machine.qemu_log.is_file() else ""
    other = " (that number is another process's now)" if proc.started(record.pid) else ""
    last = said.splitlines()[-1] if said else "nothing"
    return False, f"QEMU, process {record.pid}, is gone: killed, or crashed{other}; it last said: {last}"


def _cpu(machine: Machine, record: MachineRecord) -> tuple[bool, str]:  # noqa: ARG001 - all layers are called alike
    state = launch.cpu(machine)
    if not state:
        return False, "QEMU does not answer on its control socket: it hangs, or somebody else holds the socket"
    return state == "running", f"{state}: {launch.STUCK[state]}" if state in launch.STUCK else f"QEMU says {state}"


def _console(machine: Machine, record: MachineRecord) -> tuple[bool, str]:  # noqa: ARG001
    transcript = read_log(machine.console_log, last_boot(machine.console_log))
    for failure in machine.config.guest.failures:
        if failure.cause != "login" and transcript.match(failure.expect):
            return False, f"the guest {failure.says}"
    last = transcript.tail(1)
    return True, f"nothing there says that the boot has failed; its last line: {last[0].strip() if last else 'none'}"


def last_boot(log: Path) -> int:
    """Where in the console's record the last boot begins, as well as that can be told: at the last firmware's line."""
    try:
        data = log.read_bytes()
    except OSError:
        return 0
    return max(data.rfind(b"SeaBIOS"), data.rfind(b"Linux version"), 0)


def _port(machine: Machine, record: MachineRecord) -> tuple[bool, str]:  # noqa: ARG001
    try:
        with socket.create_connection(("127.0.0.1", record.ssh_port), PORT_S):
            return True, f"127.0.0.1:{record.ssh_port} is forwarded by QEMU, which says nothing of the guest"
    except OSError as error:
        return False, f"127.0.0.1:{record.ssh_port} takes no connection ({error})"


def _banner(machine: Machine, record: MachineRecord) -> tuple[bool, str]:
    said = b""
    deadline = time.monotonic() + BANNER_S
    try:
        with socket.create_connection(("127.0.0.1", record.ssh_port), PORT_S) as connection:
            while b"\n" not in said and (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                data = connection.recv(256)
                if not data:
                    break
                said += data
    except OSError:
        pass
    line = said.partition(b"\n")[0].decode(errors="replace").strip()
    if line.startswith("SSH-"):
        return True, line
    wait_s = machine.config.guest.ssh.ready_timeout_s * machine.state.accel.factor
    up = time.time() - record.started
    if not record.ready and up < wait_s:
        return False, f"no SSH server answers yet: the guest has been booting for {progress.seconds(up)}"
    return False, "no SSH server answers in the guest: it is not started, was stopped, or its network is down"


def _login(machine: Machine, record: MachineRecord) -> tuple[bool, str]:
    target = machine.target(record)
    words = target.argv("exit 0", options=["-o", "ControlPath=none"])
    done = proc.run(words, timeout_s=LOGIN_S, check=False)
    if done.status == 0:
        return True, f"{target.user} is let in with {target.key}"
    if done.status not in (ssh.FAILED, proc.TIMED_OUT):
        return True, f"{target.user} is let in; the login shell then gave status {done.status}"
    return False, ssh.explain(done.stderr or "timed out")


def _command(machine: Machine, record: MachineRecord) -> tuple[bool, str]:
    began = time.monotonic()
    done = proc.run(machine.target(record).argv("true"), timeout_s=LOGIN_S, check=False)
    took = f"{(time.monotonic() - began) * 1000:.0f} ms"
    return done.status == 0, f"`true` gave status {done.status} after {took}"


LAYERS: dict[str, Look] = {
    "process": _process,
    "QMP": _cpu,
    "console": _console,
    "port": _port,
    "banner": _banner,
    "authentication": _login,
    "command": _command,
}


# -- this host


def host_layers(config: Config) -> Iterator[Layer]:
    """Programs, accelerator, space and ports. These do not build on each other: all are looked at."""
    for program in PROGRAMS:
        try:
            yield Layer(program, passed=True, says=proc.find(program))
        except MissingToolError as error:
            yield Layer(program, passed=False, says=f"{error.message}; {error.hint}")
    try:
        accel = State(config).accel
        yield Layer("accelerator", passed=True, says=f"{accel.name} ({accel.reason})")
    except VmTasksError as error:
        yield Layer("accelerator", passed=False, says=error.message)
    for what, folder in (("store", config.store_dir), ("state", config.vm_dir)):
        yield _space(what, folder)
    ports = (launch.FIRST_PORT, *FALLBACK_PORTS)
    free = [port for port in ports if port_free(port)]
    taken = [f"{port} {port_holder(port) or 'held'}".rstrip() for port in ports if port not in free]
    says = f"{len(free)} of {len(ports)} are free" + (f"; taken: {', '.join(taken)}" if taken else "")
    yield Layer("ports", bool(free), says)


def _space(what: str, folder: Path) -> Layer:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return Layer(what, free >= LEAST_FREE, f"{folder}: {free >> 20} MiB free")
