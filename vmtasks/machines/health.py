"""The health of a machine, of this host and of the store: layers that pass, or fail with the reason.

A machine's layer is probed only if all layers below it passed: the first failure is the cause.
"""

import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

from vmtasks.config.load import FALLBACK_PORTS, Config
from vmtasks.errors import MissingToolError, VmTasksError
from vmtasks.guest import alive
from vmtasks.guest.alive import Alive, Diagnosis, Layer
from vmtasks.host import files, process, processes, progress
from vmtasks.images.workspace import MachineRecord, Workspace
from vmtasks.machines import start
from vmtasks.machines.folder import Place
from vmtasks.qemu import qmp
from vmtasks.qemu.console import read_log
from vmtasks.qemu.ports import port_free, port_holder
from vmtasks.store.store import Store

LAYER_S = 15.0
STUCK_EVERY_S = 0.5
LEAST_FREE = 2 << 30


def is_alive(place: Place) -> Alive:
    """Probe a machine layer by layer."""
    return alive.diagnose(machine_layers(place))


@contextmanager
def warn_when_stuck(place: Place) -> Iterator[None]:
    """Report once, while the block waits for the guest, that its CPU is stopped, with cause and remedy."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(STUCK_EVERY_S):
            if state := place.stuck_state():
                progress.say(f"machine {place.name}: {qmp.STUCK[state]}; {place.remedy(state)}")
                return

    threading.Thread(target=copy_context().run, args=(watch,), name="vmtasks stuck", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def machine_layers(place: Place) -> Iterator[Layer]:
    """The layers of a machine, from its record to a command in the guest. Takes at most a minute."""
    record = place.state.machine(place.name)
    if record is None and (fault := place.fault()):
        runs = "its QEMU runs" if place.is_running() else "no QEMU of it was found"
        says = f"it cannot be read: {fault}; {runs}; vmtasks stop {place.name}, vmtasks rm {place.name}"
        yield Layer("record", passed=False, says=says, verdict="silent" if place.is_running() else "gone")
        return
    if record is None:
        yield Layer("record", passed=False, says=f"there is no machine {place.name}", verdict="gone")
        return
    yield Layer("record", passed=True, says=f"{record.guest}:{record.snapshot}, in {place.folder}")
    target = place.target(record)
    probes = {
        "process": lambda: _probe_process(place, record),
        "QMP": lambda: _probe_cpu(place),
        "console": lambda: _probe_console(place),
        **alive.network_probes(target, LAYER_S),
    }
    for layer in alive.run_probes(probes):
        if layer.name == "banner" and layer.passed is False and _is_booting(place, record):
            up = progress.seconds(time.time() - record.started)
            yield replace(layer, says=f"{layer.says}: the guest has been booting for {up}")
        else:
            yield layer


def _probe_cpu(place: Place) -> tuple[Diagnosis, str]:
    verdict, says = alive.probe_cpu(place.qmp)
    state = says.partition(":")[0]
    return verdict, f"{says}; {place.remedy(state)}" if state in qmp.STUCK else says


def _probe_process(place: Place, record: MachineRecord) -> tuple[Diagnosis, str]:
    if place.pid(record) is not None:
        return "", f"QEMU is process {record.pid}, up {progress.seconds(time.time() - record.started)}"
    if not record.pid:
        return "gone", f"it is stopped; {place.command('start')}"
    said = files.read_text(place.qemu_log, "replace").strip() if place.qemu_log.is_file() else ""
    other = " (another process has that pid now)" if processes.started(record.pid) else ""
    last = said.splitlines()[-1] if said else "nothing"
    return "gone", f"QEMU, process {record.pid}, is gone: killed, or crashed{other}; its last output: {last}"


def _probe_console(place: Place) -> tuple[Diagnosis, str]:
    transcript = read_log(place.console_log, last_boot(place.console_log))
    for failure in place.config.guest.failures:
        if failure.cause != "login" and transcript.match(failure.expect):
            return "silent", f"the guest {failure.says}"
    last = transcript.tail(1)
    return "", f"no boot failure found; its last line: {last[0].strip() if last else 'none'}"


def last_boot(log: Path) -> int:
    """The offset in the console log where the last boot begins: at its firmware's or kernel's first line."""
    try:
        with files.opened(log) as file:
            data = file.read()
    except OSError:
        return 0
    return max(data.rfind(b"SeaBIOS"), data.rfind(b"Linux version"), 0)


def _is_booting(place: Place, record: MachineRecord) -> bool:
    """Whether it has not accepted a login yet, within the time for a boot."""
    wait_s = place.config.guest.ssh.ready_timeout_s * place.state.accel.factor
    return not record.ready and time.time() - record.started < wait_s


# -- this host


def host_layers(config: Config, programs: Iterable[str] = process.REQUIRED) -> Iterator[Layer]:
    """Programs, accelerator, free space and ports. All are checked: they are independent."""
    for program in programs:
        try:
            yield Layer(program, passed=True, says=process.find(program))
        except MissingToolError as error:
            yield Layer(program, passed=False, says=f"{error.message}; {error.hint}")
    try:
        accel = Workspace(config).accel
        yield Layer("accelerator", passed=True, says=f"{accel.name} ({accel.reason})")
    except VmTasksError as error:
        yield Layer("accelerator", passed=False, says=f"{error.message}; {error.hint}".removesuffix("; "))
    for what, folder in (("store", config.store_dir), ("state", config.vm_dir)):
        yield _space_layer(what, folder)
    ports = (start.FIRST_PORT, *FALLBACK_PORTS)
    free = [port for port in ports if port_free(port)]
    taken = [f"{port} {port_holder(port) or 'held'}".rstrip() for port in ports if port not in free]
    says = f"{len(free)} of {len(ports)} are free" + (f"; taken: {', '.join(taken)}" if taken else "")
    yield Layer("ports", passed=True, says=says if free else f"{says}; the next machine gets any other")


def _space_layer(what: str, folder: Path) -> Layer:
    """Whether `folder` can be written or created, and has free space."""
    try:
        place = files.nearest_folder(folder)
        with tempfile.TemporaryFile(dir=place):
            free = files.free_bytes(place)
    except OSError as error:
        says = f"{folder} cannot be written to: {error.strerror}; VMTASKS_STORE=, VM_DIR="
        return Layer(what, passed=False, says=says)
    return Layer(what, free >= LEAST_FREE, f"{folder}: {free >> 20} MiB free")


# -- the store


def store_layers(store: Store) -> Iterator[Layer]:
    """Every image and download, byte by byte. All are checked: they are independent.

    A damaged image loses its record, so that it is rebuilt; an image that is intact again gets its record back.
    """
    for name in store.mend():
        yield Layer(name, passed=True, says="its bytes are right again; it is used again")
    for record in store.records():
        fault = store.own_fault(record, "bytes")
        if not fault and record.backing and store.below(record) is None:
            fault = f"the image below it, {record.backing[:12]}, is gone"
        what = f"image {record.digest[:12]}, {record.guest} {record.name}"
        remedy = "doit auto_install, in the project that needs it, builds it again"
        yield Layer(what, not fault, f"{fault}; {remedy}" if fault else f"{record.size >> 20} MiB, as its record says")
    for path in store.downloads():
        intact = files.sha256(path) == path.name
        says = f"{path.stat().st_size >> 20} MiB, as its name says"
        yield Layer(
            f"download {path.name[:12]}", intact, says if intact else f"wrong digest; remove {path}, then doit fetch"
        )
