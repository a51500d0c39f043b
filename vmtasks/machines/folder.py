"""Where a machine keeps what is its own: folder, record, lock, sockets and key; and whether its process is still it."""

import contextlib
from pathlib import Path

from vmtasks.config.load import Config
from vmtasks.errors import MachineError, StateError
from vmtasks.guest import ssh
from vmtasks.host import files, process, progress
from vmtasks.host.locks import lock
from vmtasks.images.workspace import MachineRecord, State
from vmtasks.qemu import qmp, vm
from vmtasks.qemu.events import Events
from vmtasks.store.records import write_record

LOCK_S = 1800.0
STOPS_AGAIN_S = 1.0


class Place:
    """The folder `.vm/run/<name>` of one machine, the short folder of its sockets, and the record that ties them."""

    def __init__(self, config: Config, name: str = "") -> None:
        """`name` is by default the configured one. Nothing is touched yet."""
        self.config = config
        self.state = State(config)
        self.name = name or config.name
        self.folder = self.state.machine_folder(self.name)

    # -- places

    @property
    def disk(self) -> Path:
        """The overlay that holds what the machine has written."""
        return self.folder / "disk.qcow2"

    @property
    def console_log(self) -> Path:
        """Everything that the serial console has said."""
        return self.folder / f"{self.name}.log"

    @property
    def qemu_log(self) -> Path:
        """What QEMU has said itself."""
        return self.folder / "qemu.log"

    @property
    def crashed(self) -> Path:
        """Is there while files in the guest may have lost what was written to them last."""
        return self.folder / "crashed"

    @property
    def key_cd(self) -> Path:
        """The CD that lets our key in, in the drive of a machine that was installed by hand."""
        return self.folder / "key.iso"

    @property
    def own_key(self) -> Path:
        """The private key of a machine that has its own; the public half is beside it with `.pub`."""
        return self.folder / "id_ed25519"

    @property
    def pidfile(self) -> Path:
        """Where QEMU writes its process id. Only this machine's QEMU has this path in its command line."""
        return (self.folder / f"{self.name}.pid").absolute()

    @property
    def sockets(self) -> Path:
        """The short folder of the machine's sockets, which need not be there; see open_sockets()."""
        return vm.socket_place(self.folder)

    @property
    def qmp(self) -> Path:
        """QEMU's control socket."""
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
        """Have the machine's folder: for us alone, because its disk holds all that is secret in the guest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def open_sockets(self) -> None:
        """Have the folder of the sockets, which is then in use. MachineError when it would not be private."""
        vm.socket_folder(self.folder)

    # -- the record, and what it says

    def record(self) -> MachineRecord | None:
        """The machine's record; None when there is no machine. StateError when there is one that cannot be read."""
        record = self.state.machine(self.name)
        if record is None and (why := self.fault()):
            raise StateError(
                f"the record of machine {self.name} cannot be read: {why}",
                hint=f"vmtasks stop {self.name} ends what runs of it; vmtasks rm {self.name} removes it with its disk",
                log=self.folder / "machine.toml",
            )
        return record

    def fault(self) -> str:
        """Why the record of a machine that is there cannot be read; empty when it can, or when there is no machine."""
        return self.state.machine_fault(self.name)

    def write(self, record: MachineRecord) -> MachineRecord:
        """Publish the record; returns it."""
        write_record(self.folder / "machine.toml", record)
        return record

    def pid(self, record: MachineRecord) -> vm.Pid | None:
        """The machine's process, if it still is that process."""
        pid = vm.Pid(record.pid, record.pid_started)
        return pid if record.pid and pid.alive(str(self.pidfile)) else None

    def process(self) -> vm.Pid | None:
        """The machine's process, whatever its record says, or if it says nothing.

        MachineError for one that is not ours to end.
        """
        record = self.state.machine(self.name)
        return (self.pid(record) if record is not None else None) or vm.find(self.pidfile)

    def is_running(self) -> bool:
        """Whether QEMU runs: as the record says, and without one that can be read by QEMU's command line."""
        record = self.state.machine(self.name)
        if record is not None:
            return self.pid(record) is not None
        try:
            return vm.find(self.pidfile) is not None
        except MachineError:
            return True

    def pidfile_pid(self) -> int:
        """The process id that QEMU's pid file names; 0 where there is none. It proves nothing."""
        try:
            return int(files.read(self.pidfile))
        except (OSError, ValueError):
            return 0

    def stuck_state(self) -> str:
        """The key of qmp.STUCK that says why the machine's CPU stands still; '' when it runs, or QEMU does not answer.

        QEMU is asked only where its events say so, or where the last one could not be written.
        """
        events = Events(self.events)
        state = qmp.status(self.qmp) if events.cpu_stopped() or events.truncated() else ""
        return state if state in qmp.STUCK else ""

    def remedy(self, state: str) -> str:
        """What to do about a machine that is stuck."""
        if state == qmp.FULL:
            return f"free some space in {self.folder}: the next command lets it go on"
        return f"vmtasks {'resume' if state == 'paused' else 'stop --force'} {self.name}"

    def resume_if_full(self) -> None:
        """Let the machine go on if QEMU has stopped it as its disk could not be written; its guest notices nothing.

        MachineError when it cannot be written yet.
        """
        if self.stuck_state() != qmp.FULL:
            return
        vm.control(self.qmp, "cont")()  # QEMU writes again what it could not
        if vm.wait_until(lambda: qmp.status(self.qmp) == qmp.FULL, STOPS_AGAIN_S, every_s=0.2):
            free = files.free_bytes(self.folder) >> 10
            raise MachineError(
                f"machine {self.name} stands still: its disk cannot be written; {self.folder} has {free} KiB free",
                hint=self.remedy(qmp.FULL),
            )
        progress.say(f"machine {self.name}: its disk can be written again, and it goes on")

    def bootstrap_key(self, record: MachineRecord) -> Path:
        """The private key that the machine's image lets in: the store's, or the one that was saved with a snapshot."""
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
        """What a user types to `start` or `stop` this machine."""
        record = self.state.machine(self.name)
        return f"vmtasks {verb} {self.name}" if record is not None and record.own else f"doit {verb}"

    # -- one command at a time

    def lock(self, timeout_s: float = LOCK_S, *, say: bool = True) -> contextlib.AbstractContextManager[int]:
        """Be the only command at work on the machine. The lock is beside its folder, which destroy() removes.

        BusyError after `timeout_s` seconds; `say` who is waited for.
        """
        what = f"machine {self.name}"
        return lock(
            self.lock_file,
            what,
            timeout_s=timeout_s,
            waiting=(lambda holder: progress.say(f"{what}: {holder} is at work on it; waiting")) if say else None,
        )

    @property
    def lock_file(self) -> Path:
        """Where the lock is."""
        return self.folder.with_name(f".{self.name}.lock")

    def ssh_line(self) -> str:
        """The line that logs in to the machine, ready for a shell."""
        return process.quote(["ssh", "-F", str(self.folder / "ssh_config"), self.name])
