"""Real doit, real QEMU, the tiny guest: scratch projects, the store that they share, and proof that nothing is left."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmtasks.host.locks import lock
from vmtasks.store.store import Store

if TYPE_CHECKING:
    from remotes import Guest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("dodo.py", "config", "phases/tiny", "examples/project")
RUN_S = 400.0
INSTALL_S = 480.0
OURS = re.compile(r"VM_.*|VMTASKS_.*|SSH_PORT|DFLY_VERSION|XDG_RUNTIME_DIR")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Switches of the VM tests; they are known where the command names tests/vm or a file in it."""
    parser.addoption("--seed", type=int, help="which commands of the rehearsal fail; the day's number by default")
    parser.addoption("--remake-golden", action="store_true", help="write expected records anew; look at the difference")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have counted, also those of parallel workers."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "counts":
                    terminalreporter.write_line(f"{report.nodeid}: {value}")


def pytest_configure() -> None:
    """A shell in the background ignores SIGINT and SIGQUIT, nohup SIGHUP; and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


LONGEST = ("pipeline", "rehearsal", "machines_use", "remote", "remote_jobs", "machines", "failures", "python_api")
"""The files that take longest begin first, so that they do not run alone at the end. What the first run of the pipeline
installs, others use; the rehearsal needs nothing of it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that is here boots guests. The longest files come first."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.vm)
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@dataclass(frozen=True)
class Ended:
    """A doit that has ended: its status, all that it printed, and how long it took."""

    status: int
    output: str
    took_s: float = 0.0

    def good(self) -> str:
        """The output of a run that must have ended well."""
        assert self.status == 0, self.output
        return self.output

    def bad(self, status: int = 1) -> str:
        """The output of a run that must have failed, without a traceback."""
        assert self.status == status, self.output
        assert "Traceback" not in self.output, self.output
        return self.output


@dataclass(frozen=True)
class Boot:
    """A line of the journal of boots."""

    phase: str
    digest: str


@dataclass
class Doit:
    """A doit that is under way, a child of ours with its own process group and its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = RUN_S) -> Ended:
        """Wait for its end; one that takes longer is ended, and the test fails."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"doit did not end within {timeout_s:g} s:\n{self.output}")
        return Ended(status, self.output, time.monotonic() - self.began)

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Wait until it has printed `text`."""
        until(lambda: text in self.output or self.process.poll() is not None, timeout_s, f"{text!r} in {self.log}")
        assert text in self.output, self.output

    def kill(self) -> None:
        """SIGKILL, to doit alone: what it has started must see to itself."""
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until `condition` holds; the test fails when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.02)


def free_port() -> int:
    """A loopback port that nobody holds at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def qemus(*marks: Path) -> list[int]:
    """The QEMUs whose command line names one of these folders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        program, _, rest = words.partition(b"\0")
        if b"qemu-system" in program and any(os.fsencode(mark) + b"/" in rest for mark in marks):
            found.append(int(path.parent.name))
    return found


class Project:
    """A scratch copy of what a project needs, with its own state folder and port, on some store."""

    def __init__(self, root: Path, store: Path) -> None:
        """Copy the parts of the repository to `root`, which must not exist."""
        self.root, self.store, self.port = root, store, free_port()
        self.state, self.tiny = root / ".vm", root / ".vm" / "tiny"
        self.name = "tiny"
        self._runs = 0
        for part in PARTS:
            target = root / part
            target.parent.mkdir(parents=True, exist_ok=True)
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy2(source, target)
        config = root / "config/vm.toml"
        config.write_text(re.sub(r'(?m)^guest = "\w+"', 'guest = "tiny"', config.read_text()))

    # -- doit

    def env(self) -> dict[str, str]:
        """The environment of a run: ours without what configures vmtasks, and then what this project wants."""
        clean = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
        return {
            **clean,
            "PYTHONPATH": str(REPOSITORY),
            "VM_SSH_PORT": str(self.port),
            "VMTASKS_STORE": str(self.store),
        }

    def start(self, *words: str, env: dict[str, str] | None = None) -> Doit:
        """Start `doit WORDS...` with stdin closed."""
        self._runs += 1
        log = self.root / f"run-{self._runs}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "doit", *words],
                cwd=self.root,
                env={**self.env(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Doit(process, log)

    def doit(self, *words: str, env: dict[str, str] | None = None, timeout_s: float = RUN_S) -> Ended:
        """Run `doit WORDS...` to its end."""
        return self.start(*words, env=env).wait(timeout_s)

    # -- what it has left behind

    def boots(self) -> list[Boot]:
        """Every boot of a phase so far, in order."""
        journal = self.tiny / "logs" / "boots.log"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [Boot(*line.split(" ", 3)[1:3]) for line in lines]

    def published(self) -> set[str]:
        """Digests of the images that the store holds a record of."""
        return {path.name.partition(".")[0] for path in (self.store / "images").glob("[!.]*.toml")}

    def digest(self, number: int) -> str:
        """Digest of the image that phase `number` has led to."""
        return str(tomllib.loads((self.tiny / f"phase-{number}.toml").read_text())["digest"])

    def image(self, number: int) -> Path:
        """That image."""
        named, store = tomllib.loads((self.tiny / f"phase-{number}.toml").read_text()), Store(self.store)
        record = store.record(named["digest"], named["sha256"])
        assert record is not None
        return store.image(record)

    def results(self) -> dict[str, int]:
        """Results by name, with their mtimes."""
        return {path.name: path.stat().st_mtime_ns for path in (self.state / "results").glob("*.xml")}

    def qemus(self) -> list[int]:
        """QEMUs of this project, of phases and machines alike."""
        return qemus(self.root)

    def machine(self, name: str = "") -> dict[str, object]:
        """The record of a machine."""
        return tomllib.loads((self.state / "run" / (name or self.name) / "machine.toml").read_text())

    # -- changes

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace the one place in a file that says `old`."""
        file = self.root / path
        text = file.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
        file.write_text(text.replace(old, new))

    def append(self, path: str, text: str) -> None:
        """Add to the end of a file."""
        with (self.root / path).open("a") as file:
            file.write(text)

    def ssh(self, command: str, *, user: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in the machine with the plain OpenSSH client, as anybody could."""
        config = self.state / "run" / self.name / "ssh_config"
        login = ["-l", user, "-o", "ControlPath=none"] if user else []  # a shared connection is the other user's
        return subprocess.run(
            ["ssh", "-F", str(config), *login, self.name, command],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )

    def clean_up(self) -> None:
        """Take the machine away by the front door, and prove that no process of this project is left."""
        if (self.state / "run").exists():
            self.doit(f"name={self.name}", "destroy", "--yes", timeout_s=120)
        left = self.qemus()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"QEMUs were left: {left}"


def copy_store(source: Path, target: Path, *, images: bool) -> Path:
    """A store with the same installer and keys, and with or without the same images; times of files are kept."""
    for part in ("downloads", "media", "packages", "keys", *(["images"] if images else [])):
        if (source / part).exists():
            shutil.copytree(source / part, target / part, symlinks=True, dirs_exist_ok=True)
    for name in ("accel.json", "history.json"):
        if (source / name).exists():
            shutil.copy2(source / name, target / name)
    return target


@pytest.fixture(scope="session")
def installer_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that tests share, with the guest's installer in it; VMTASKS_TEST_STORE names one that outlives them.

    Parallel runs of pytest share it too: the second finds what it needs, or waits until it is there.
    """
    named = os.environ.get("VMTASKS_TEST_STORE", "")
    base = tmp_path_factory.getbasetemp()
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    root = Path(named) if named else (base.parent if parallel else base) / "store"
    Project(tmp_path_factory.mktemp("fetch") / "project", root).doit("fetch", timeout_s=480).good()
    return root


def installing(store: Path) -> AbstractContextManager[int]:
    """Hold this while the guest is installed into the store that tests share: the others wait for it."""
    return lock(store.parent / f".{store.name}.install.lock", "the first installation", timeout_s=INSTALL_S)


def is_installed(store: Path) -> bool:
    """Whether anything was installed in it. A store that outlives its tests has been filled by others."""
    return any((store / "images").glob("[!.]*.toml"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, installer_store: Path) -> Iterator[Path]:
    """The store that tests share, with the installed guest in it."""
    project = Project(tmp_path_factory.mktemp("first") / "project", installer_store)
    with installing(installer_store):
        project.doit("auto_install", timeout_s=INSTALL_S).good()
    yield installer_store
    project.clean_up()


@pytest.fixture(scope="session")
def remote_guest(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator["Guest"]:
    """The machine that all tests of vmtasks.guest share. Who ends it starts it again; see `guest`."""
    from remotes import Guest  # noqa: PLC0415 - it imports this module

    project = Project(tmp_path_factory.mktemp("remote") / "project", store)
    made = Guest(project)
    made.start()
    yield made
    project.clean_up()


@pytest.fixture
def guest(remote_guest: "Guest") -> "Guest":
    """That machine, running."""
    if not remote_guest.runs():
        remote_guest.start()
    return remote_guest


@pytest.fixture
def project(tmp_path: Path, store: Path) -> Iterator[Project]:
    """A project on the shared store: nothing needs to boot until a test changes something."""
    made = Project(tmp_path / "project", store)
    yield made
    made.clean_up()


@pytest.fixture
def bare_store(tmp_path: Path, installer_store: Path) -> Path:
    """A store of the test's own, with the installer in it and no image."""
    return copy_store(installer_store, tmp_path / "store", images=False)


@pytest.fixture
def full_store(tmp_path: Path, store: Path) -> Path:
    """A store of the test's own with all images, to be damaged."""
    return copy_store(store, tmp_path / "store", images=True)


def listeners(pids: Sequence[int]) -> set[str]:
    """Addresses, in hexadecimal as the kernel shows them, on which these processes listen for TCP."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(str(handle.readlink()))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].partition(":")[0])
    return found
