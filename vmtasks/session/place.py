"""Where a machine keeps what is its own: folder, record, lock, sockets and key; and whether its process is still it."""

import contextlib
from pathlib import Path

from vmtasks import proc, progress
from vmtasks.config import Config
from vmtasks.lock import lock
from vmtasks.machine import vm
from vmtasks.remote import ssh
from vmtasks.state import MachineRecord, State
from vmtasks.store import write_record

LOCK_S = 1800.0


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
    def sockets(self) -> Path:
        """The short folder of the machine's sockets."""
        return vm.socket_folder(self.folder)

    @property
    def qmp(self) -> Path:
        """QEMU's control socket. Only this machine's QEMU has this path in its command line."""
        return self.sockets / "qmp"

    @property
    def events(self) -> Path:
        """The base of the files that hold QEMU's events; see machine/events.py."""
        return self.folder / "events"

    @property
    def serial(self) -> Path:
        """The socket of the guest's serial console."""
        return self.sockets / "serial"

    # -- the record, and what it says

    def record(self) -> MachineRecord | None:
        """The machine's record; None when there is no machine."""
        return self.state.machine(self.name)

    def write(self, record: MachineRecord) -> MachineRecord:
        """Publish the record; returns it."""
        write_record(self.folder / "machine.toml", record)
        return record

    def pid(self, record: MachineRecord) -> vm.Pid | None:
        """The machine's process, if it still is that process."""
        pid = vm.Pid(record.pid, record.pid_started)
        return pid if record.pid and pid.alive(str(self.qmp)) else None

    def door_key(self, record: MachineRecord) -> Path:
        """The private key that the machine's image lets in: the store's, or the one that was saved with a snapshot."""
        saved = self.state.snapshot_key(record.image)
        return saved if saved.is_file() else self.state.key

    def target(self, record: MachineRecord) -> ssh.Target:
        """The machine as ssh sees it."""
        key = self.own_key if record.key == "own" else self.door_key(record)
        return ssh.Target(self.name, record.ssh_port, record.ssh_user, key, tuple(record.host_keys), self.sockets)

    def command(self, verb: str) -> str:
        """What a user types to `start` or `stop` this machine."""
        record = self.record()
        return f"vmtasks {verb} {self.name}" if record is not None and record.own else f"doit {verb}"

    # -- one command at a time

    def lock(self, timeout_s: float = LOCK_S) -> contextlib.AbstractContextManager[int]:
        """Be the only command at work on the machine. The lock is beside its folder, which destroy() removes."""
        what = f"machine {self.name}"
        return lock(
            self.lock_file,
            what,
            timeout_s=timeout_s,
            waiting=lambda holder: progress.say(f"{what}: {holder} is at work on it; waiting"),
        )

    @property
    def lock_file(self) -> Path:
        """Where the lock is."""
        return self.folder.with_name(f".{self.name}.lock")

    def ssh_line(self) -> str:
        """The line that logs in to the machine, ready for a shell."""
        return proc.quote(["ssh", "-F", str(self.folder / "ssh_config"), self.name])
