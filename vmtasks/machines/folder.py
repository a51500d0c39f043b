"""A machine's folder: its record, lock, sockets and keys; and whether its process still runs."""

import contextlib
from pathlib import Path

from vmtasks.config.load import Config
from vmtasks.errors import MachineError, StateError
from vmtasks.guest import ssh
from vmtasks.host import files, process, progress
from vmtasks.host.locks import lock
from vmtasks.images.workspace import MachineRecord, Workspace
from vmtasks.qemu import qmp, vm
from vmtasks.qemu.events import Events
from vmtasks.store.records import write_record

LOCK_S = 1800.0
STOPS_AGAIN_S = 1.0


class Place:
    """The folder `.vm/run/<name>` of one machine, the short folder of its sockets, and its record."""

    def __init__(self, config: Config, name: str = "") -> None:
        """`name` defaults to the configured one. Touches nothing yet."""
        self.config = config
        self.state = Workspace(config)
        self.name = name or config.name
        self.folder = self.state.machine_folder(self.name)

    # -- places

    @property
    def disk(self) -> Path:
        """The overlay with the machine's writes."""
        return self.folder / "disk.qcow2"

    @property
    def console_log(self) -> Path:
        """The log of the serial console."""
        return self.folder / f"{self.name}.log"

    @property
    def qemu_log(self) -> Path:
        """QEMU's own output."""
        return self.folder / "qemu.log"

    @property
    def crashed(self) -> Path:
        """Exists while files in the guest may have lost their last writes."""
        return self.folder / "crashed"

    @property
    def key_cd(self) -> Path:
        """The CD that installs our key, for a machine that was installed by hand."""
        return self.folder / "key.iso"

    @property
    def own_key(self) -> Path:
        """The machine's own private key, if it has one; the public key is beside it with `.pub`."""
        return self.folder / "id_ed25519"

    @property
    def pidfile(self) -> Path:
        """QEMU's pid file. Only this machine's QEMU has this path in its command line."""
        return (self.folder / f"{self.name}.pid").absolute()

    @property
    def sockets(self) -> Path:
        """The short folder of the machine's sockets, which may not exist; see open_sockets()."""
        return vm.socket_place(self.folder)

    @property
    def qmp(self) -> Path:
        """QEMU's QMP socket."""
        return self.sockets / "qmp"

    @property
    def events(self) -> Path:
        """The base of the files that hold QEMU's events; see qemu/events.py."""
        return self.folder / "events"

    @property
    def serial(self) -> Path:
        """The socket of the guest's serial console."""
        return self.sockets / "serial"

    def make_folder(self) -> None:
        """Create the machine's folder with mode 0700, because its disk holds the guest's secrets."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def open_sockets(self) -> None:
        """Create the folder of the sockets and mark it as used. MachineError if it would not be private."""
        vm.socket_folder(self.folder)

    # -- the record

    def record(self) -> MachineRecord | None:
        """The machine's record; None if there is no machine. StateError for an unreadable record."""
        record = self.state.machine(self.name)
        if record is None and (why := self.fault()):
            raise StateError(
                f"the record of machine {self.name} cannot be read: {why}",
                hint=f"vmtasks stop {self.name} stops its QEMU; vmtasks rm {self.name} removes it with its disk",
                log=self.folder / "machine.toml",
            )
        return record

    def fault(self) -> str:
        """Why the record of an existing machine cannot be read, or ''."""
        return self.state.machine_fault(self.name)

    def write(self, record: MachineRecord) -> MachineRecord:
        """Write the record; returns it."""
        write_record(self.folder / "machine.toml", record)
        return record

    def pid(self, record: MachineRecord) -> vm.Pid | None:
        """The machine's process; None if it no longer runs or its pid was reused."""
        pid = vm.Pid(record.pid, record.pid_started)
        return pid if record.pid and pid.alive(str(self.pidfile)) else None

    def process(self) -> vm.Pid | None:
        """The machine's process, by its record or else by QEMU's command line.

        MachineError for a process that is not ours.
        """
        record = self.state.machine(self.name)
        return (self.pid(record) if record is not None else None) or vm.find(self.pidfile)

    def is_running(self) -> bool:
        """Whether QEMU runs: by the record, or without a readable one by QEMU's command line."""
        record = self.state.machine(self.name)
        if record is not None:
            return self.pid(record) is not None
        try:
            return vm.find(self.pidfile) is not None
        except MachineError:
            return True

    def pidfile_pid(self) -> int:
        """The pid in QEMU's pid file, 0 if there is none. It proves nothing."""
        try:
            return int(files.read(self.pidfile))
        except (OSError, ValueError):
            return 0

    def stuck_state(self) -> str:
        """The key of qmp.STUCK for why the guest's CPU is stopped; '' if it runs, or QEMU does not answer.

        Asks QEMU only if its events report a stop, or the last event could not be written.
        """
        events = Events(self.events)
        state = qmp.status(self.qmp) if events.cpu_stopped() or events.truncated() else ""
        return state if state in qmp.STUCK else ""

    def remedy(self, state: str) -> str:
        """The hint for a machine in a stuck state."""
        if state == qmp.FULL:
            return f"free some space in {self.folder}: the next command lets it go on"
        return f"vmtasks {'resume' if state == 'paused' else 'stop --force'} {self.name}"

    def resume_if_full(self) -> None:
        """Resume a machine that QEMU paused because its disk could not be written; the guest notices nothing.

        MachineError if the disk still cannot be written.
        """
        if self.stuck_state() != qmp.FULL:
            return
        vm.control(self.qmp, "cont")()  # QEMU retries the failed writes
        if vm.wait_until(lambda: qmp.status(self.qmp) == qmp.FULL, STOPS_AGAIN_S, every_s=0.2):
            free = files.free_bytes(self.folder) >> 10
            raise MachineError(
                f"machine {self.name} is paused: its disk cannot be written; {self.folder} has {free} KiB free",
                hint=self.remedy(qmp.FULL),
            )
        progress.say(f"machine {self.name}: its disk can be written again; it continues")

    def bootstrap_key(self, record: MachineRecord) -> Path:
        """The private key that the image accepts: the store's, or the one saved with a snapshot."""
        saved = self.state.snapshot_key(record.image)
        return saved if saved.is_file() else self.state.key

    def target(self, record: MachineRecord) -> ssh.Target:
        """The machine as ssh sees it."""
        key = self.own_key if record.key == "own" else self.bootstrap_key(record)
        extra_keys = (self.own_key,) if record.key == "changing" else ()
        return ssh.Target(
            self.name, record.ssh_port, record.ssh_user, key, tuple(record.host_keys), self.sockets, extra_keys
        )

    def command(self, verb: str) -> str:
        """The command that a user types to `start` or `stop` this machine."""
        record = self.state.machine(self.name)
        return f"vmtasks {verb} {self.name}" if record is not None and record.own else f"doit {verb}"

    # -- one command at a time

    def lock(self, timeout_s: float = LOCK_S, *, say: bool = True) -> contextlib.AbstractContextManager[int]:
        """Take the machine's exclusive lock. The lock file is beside the folder, which destroy() removes.

        BusyError after `timeout_s` seconds. `say` reports the holder while waiting.
        """
        what = f"machine {self.name}"
        return lock(
            self.lock_file,
            what,
            timeout_s=timeout_s,
            waiting=(lambda holder: progress.say(f"{what}: {holder} holds its lock; waiting")) if say else None,
        )

    @property
    def lock_file(self) -> Path:
        """The lock file."""
        return self.folder.with_name(f".{self.name}.lock")

    def ssh_line(self) -> str:
        """The line that logs in to the machine, ready for a shell."""
        return process.quote(["ssh", "-F", str(self.folder / "ssh_config"), self.name])
