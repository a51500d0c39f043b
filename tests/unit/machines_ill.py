"""Machines whose guest never answers, on real QEMU: a store whose `clean` is one boot sector that sleeps."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bootsector import hang, sector
from forked import run_command_line
from vmtasks.images.workspace import PhaseRecord, Workspace
from vmtasks.machines import Project
from vmtasks.qemu import argv
from vmtasks.store.records import ImageRecord, write_record

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
DIGEST = "a" * 64


def until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Poll until `condition` holds; the test fails when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


class Home:
    """Somebody's state folder and store, and `vmtasks` as they run it."""

    def __init__(self, root: Path) -> None:
        """`root` is there and empty. It becomes a project of the tiny guest."""
        self.root = root
        shutil.copytree(REPOSITORY / "phases/tiny", root / "phases/tiny", symlinks=True)
        (root / "config").mkdir()
        (root / "config/vm.toml").write_text('guest = "tiny"\n')
        self.run_folder = root / "vms" / "run"
        self.env = {
            "HOME": str(root), "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY),
            "VMTASKS_STORE": str(root / "store"), "VM_DIR": str(root / "vms"),
        }  # fmt: skip
        self.project = Project(root, self.env)
        self.config = self.project.config()
        self.state = Workspace(self.config)

    def publish(self) -> None:
        """Have an image that boots and then sleeps as `clean`, and a key pair."""
        store = self.state.store
        for folder in ("images", "keys"):
            (store.root / folder).mkdir(parents=True, mode=0o700)
        raw = self.root / "raw"
        raw.write_bytes(sector(hang()).ljust(1 << 20, b"\0"))
        words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, store.partial(DIGEST)]
        subprocess.run(words, check=True)
        made = store.publish(
            DIGEST,
            lambda stat, sha256: ImageRecord(
                digest=DIGEST, guest="tiny", version="", name="3-provision", size=stat.st_size,
                mtime_ns=stat.st_mtime_ns, sha256=sha256, virtual_size=1 << 20, ssh_user="dev",
                host_keys=["ssh-ed25519 AAAA"],
            ),
        )  # fmt: skip
        write_record(self.state.clean_record, PhaseRecord(digest=DIGEST, sha256=made.sha256))
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.state.key], check=True)

    def __call__(self, *words: str, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it never shows a traceback."""
        done = run_command_line(*words, cwd=self.root, env=self.env, timeout_s=timeout_s)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command under way."""
        return subprocess.Popen(
            self.line(*words), cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def line(self, *words: str) -> list[str]:
        return [sys.executable, "-c", "from vmtasks.cli import main; main()", *words]

    def qemus(self) -> list[int]:
        """The QEMUs of this home."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                program, _, rest = path.read_bytes().partition(b"\0")
                if program.endswith(argv.PROGRAM.encode()) and f"{self.root}/".encode() in rest:
                    found.append(int(path.parent.name))
        return found

    def record(self, name: str) -> dict[str, object]:
        """A machine's record."""
        return tomllib.loads((self.run_folder / name / "machine.toml").read_text())

    def booting(self, name: str) -> int:
        """Wait until a machine boots and is recorded; returns its process."""
        path = self.run_folder / name / "machine.toml"
        until(lambda: path.is_file() and self.record(name)["pid"], f"a record of {name}")
        return int(str(self.record(name)["pid"]))
