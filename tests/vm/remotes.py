"""One running machine for all tests of vmtasks.guest, with a hand on its QEMU and on its SSH server."""

import contextlib
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import Project, until
from vmtasks.config.load import load
from vmtasks.guest import client, ssh
from vmtasks.guest.link import Link
from vmtasks.machines import Machine
from vmtasks.qemu import qmp

START = "/usr/sbin/sshd"
LIMIT_S = 60.0


def processes(how: str) -> str:
    """A command line: the SSH server's own process (`==`), or those of its sessions (`!=`)."""
    return f'ps -o pid,args | awk \'$2 == "sshd:" && $3 {how} "/usr/sbin/sshd" {{ print $1 }}\''


class Guest:
    """The tiny guest, as its SSH client sees it."""

    def __init__(self, project: Project) -> None:
        self.project = project

    @property
    def target(self) -> ssh.Target:
        """What the machine's record says."""
        run = self.project.state / "run" / "tiny"
        record = tomllib.loads((run / "machine.toml").read_text())
        return ssh.Target(
            "tiny",
            record["ssh_port"],
            record["ssh_user"],
            run / "id_ed25519",
            tuple(record["host_keys"]),
            (run / "ssh_config").resolve().parent,
        )

    def start(self) -> None:
        """Have it running and answering."""
        self.project.doit("start").good()

    def connect(self, **more: Any) -> client.Connection:
        return client.connect(self.target, **{"timeout_s": LIMIT_S, **more})

    def machine(self) -> Machine:
        """As the project knows it."""
        return Machine(load(self.project.root, {"store": str(self.project.store)}, {}))

    def link(self, **more: Any) -> Link:
        """A link with a long window: after a reset, an emulated guest on a busy host may boot for minutes."""
        return Link(self.target, **{"connect_s": 30.0, "window_s": 400.0, **more})

    @property
    def control(self) -> Path:
        """QEMU's control socket."""
        return (self.project.state / "run/tiny/tiny-monitor.socket").resolve()

    @contextlib.contextmanager
    def monitor(self) -> Iterator[qmp.Qmp]:
        with qmp.connect(self.control, timeout_s=20) as connection:
            yield connection

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One QMP command."""
        with self.monitor() as connection:
            return connection.cmd(command, **arguments)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Its CPU is stopped for the length of the block."""
        self.qmp("stop")
        try:
            yield
        finally:
            self.qmp("cont")

    def pid(self) -> int:
        (pid,) = self.project.qemus()
        return pid

    def runs(self) -> bool:
        return bool(self.project.qemus())

    def root(self, text: str) -> str:
        """Run a script as root over a connection of its own."""
        with self.connect() as connection:
            done = connection.execute(text, user="root", timeout_s=LIMIT_S)
        assert done.status == 0, done
        return done.stdout.decode()

    def without_server(self, seconds: int, *, sessions: bool = False) -> None:
        """The SSH server ends, with its sessions if asked, and is back after that many seconds."""
        ends = f"kill $({processes('==')})" + (f" $({processes('!=')})" if sessions else "")
        # In a session of its own, and later: the one that brings the order must be over.
        script = shlex.quote(f"sleep 1; {ends}; sleep {seconds}; {START}")
        self.root(f"setsid sh -c {script} </dev/null >/dev/null 2>&1 &")

    def console(self) -> list[str]:
        log: Path = self.project.state / "run/tiny/tiny.log"
        return log.read_text(errors="replace").splitlines()[-5:]


def until_true(condition: Any, what: str, timeout_s: float = LIMIT_S) -> None:
    until(condition, timeout_s, what)
