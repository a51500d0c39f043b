"""Machines that are ill or left behind: a damaged record, a start that hangs, somebody else's lock, a folder half made.

QEMU, processes, locks and users are real; the guest is a boot sector that sleeps.
"""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import tomli_w  # noqa: F401 - loaded before a child becomes a user who may not read it
from machines_ill import Home, until
from phaserun import machine as spec
from phaserun import needs_qemu

from amount import cases
from bootsector import hang, sector
from conftest import mounted_tmpfs
from vmtasks.errors import StateError
from vmtasks.host import files, processes, progress
from vmtasks.host.locks import lock
from vmtasks.images.steps import Builder
from vmtasks.images.workspace import BindRecord, MachineRecord
from vmtasks.machines import Machine, MachineSpec, life, overlay
from vmtasks.qemu import vm

pytestmark = pytest.mark.timeout(240)
NOBODY = 65534
SOON_S = 30.0
"""Within seconds, on a busy host; a start waits for minutes."""


@pytest.fixture(scope="module")
def kept() -> Iterator[Home]:
    """A home on which tests of this file go on; its path is short, and anybody may enter it."""
    root = Path(tempfile.mkdtemp(prefix="vmtasks-test-", dir="/tmp"))
    root.chmod(0o755)
    made = Home(root)
    made.publish()
    yield made
    made("rm", "--all", "--force")
    left = made.qemus()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(root)
    assert not left


@pytest.fixture
def home(kept: Home) -> Iterator[Home]:
    """That home, in which no machine is left from the test before."""
    yield kept
    for pid in kept.qemus():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not kept.qemus(), "the last QEMU to go")
    shutil.rmtree(kept.run_folder, ignore_errors=True)


@pytest.fixture
def alone(home: Home) -> int:
    """The process of a machine `a` that boots, and whose starter was killed."""
    starter = home.start("run", "-d", "--name", "a")
    pid = home.booting("a")
    starter.kill()
    starter.communicate()
    assert home.qemus() == [pid]
    return pid


def damage(home: Home, how: str) -> None:
    record = home.run_folder / "a" / "machine.toml"
    if how == "gone":
        record.unlink()
    else:
        forged = record.read_text().replace("pid = ", "pid = -")
        record.write_bytes({"cut": b'name = "a"\npi', "binary": bytes(range(256)), "forged": forged.encode()}[how])


# -- a record that cannot be read


@needs_qemu
@pytest.mark.parametrize("how", cases("cut", more=["forged", "binary", "gone"]))
def test_a_machine_without_a_readable_record_is_shown_and_stopped_and_removed(home: Home, alone: int, how: str):
    damage(home, how)
    listed = home("ps", "--json")
    assert listed.returncode == 0, listed.stderr
    (shown,) = json.loads(listed.stdout)
    assert (shown["name"], shown["status"], shown["pid"]) == ("a", "damaged", alone)
    assert shown["fault"]
    table = home("ps")
    assert table.returncode == 0
    assert f"its record cannot be read: {shown['fault']}; its QEMU, process {alone}, runs" in table.stderr
    for words in ("start a", "restore --yes a", "keys list a", "ssh a true", "exec a true"):
        refused = home(*words.split())
        assert refused.returncode == (125 if words.endswith("true") else 1), (words, refused)
        assert "the record of machine a cannot be read" in refused.stderr, (words, refused.stderr)
    assert home("doctor", "a").returncode == 1
    assert "a machine 'a' already" in home("run", "-d", "--name", "a").stderr
    assert home.qemus() == [alone], "nothing was started beside it, and nothing ended it"
    assert "running: a" in home("rm", "a").stderr
    if how in ("cut", "gone"):
        stopped = home("stop", "a", "--timeout", "0.5")
        assert "stopped (" in stopped.stderr
        assert stopped.returncode == 0
        assert home.qemus() == []
        assert (home.run_folder / "a" / "disk.qcow2").is_file(), "what is on its disk is kept"
    removed = home("rm", "--force", "a")
    assert removed.returncode == 0, removed.stderr
    assert "nothing is copied back from its binds" in removed.stderr
    assert home.qemus() == []
    assert list(home.run_folder.iterdir()) == []


@needs_qemu
def test_a_number_in_a_pid_file_is_no_proof(home: Home):
    folder = Machine(home.config, home.project.create(MachineSpec(name="a")).name).folder
    damage(home, "cut")
    with subprocess.Popen(["sleep", "300"]) as other:
        (folder / "a.pid").write_text(f"{other.pid}\n")
        done = home("rm", "--force", "a")
        assert done.returncode == 0
        assert f"process {other.pid} in its pid file cannot be proved to be its QEMU" in done.stderr
        assert other.poll() is None
        other.kill()


def test_a_command_line_that_only_speaks_of_the_machine_is_no_proof(home: Home):
    machine = Machine(home.config, home.project.create(MachineSpec(name="a")).name)
    damage(home, "cut")
    with subprocess.Popen(["sh", "-c", "sleep 300", "qemu-system-x86_64", "-pidfile", machine.place.pidfile]) as other:
        until(lambda: str(machine.place.pidfile) in processes.words(other.pid), "its command line")
        assert machine.place.process() is None
        machine.remove()
        assert other.poll() is None
        other.kill()


def test_a_socket_that_somebody_serves_and_will_not_leave_is_said(home: Home):
    machine = Machine(home.config, home.project.create(MachineSpec(name="a")).name)
    damage(home, "cut")
    machine.place.open_sockets()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(machine.place.qmp))
        server.listen()
        done = home("rm", "--force", "a")
    assert done.returncode == 1
    assert f"another process serves {machine.place.qmp} and does not exit; nothing was removed" in done.stderr
    assert machine.folder.exists()
    machine.place.qmp.unlink()


@needs_qemu
def test_a_machine_that_was_not_recorded_in_time_is_ended_before_another_starts(home: Home, alone: int):
    """Its starter was killed between QEMU's start and the record, and its sockets were cleaned away."""
    machine = Machine(home.config, "a")
    record = machine.place.record()
    assert record is not None
    machine.place.write(msgspec.structs.replace(record, pid=0, pid_started=""))
    shutil.rmtree(machine.place.sockets)
    starter = home.start("start", "a")
    until(lambda: home.booting("a") != alone, "another QEMU")
    assert home.qemus() == [home.booting("a")]
    home("stop", "--force", "a")
    starter.communicate()


# -- a start that hangs


@needs_qemu
@pytest.mark.parametrize("words", [["stop", "--force"], ["rm", "--force"]], ids=" ".join)
def test_force_ends_a_start_that_hangs(home: Home, words: list[str]):
    home.project.create(MachineSpec(name="a"))
    starter = home.start("start", "a")
    pid = home.booting("a")
    began = time.monotonic()
    done = home(*words, "a")
    assert time.monotonic() - began < SOON_S
    assert done.returncode == 0, done.stderr
    assert f"machine a: process {starter.pid} (" in done.stderr
    assert " holds its lock; its power is cut" in done.stderr
    _, said = starter.communicate(timeout=SOON_S)
    assert starter.returncode == 1, "it has noticed by itself"
    assert "error: machine a" in said
    assert "Traceback" not in said
    assert not processes.started(pid)
    assert home.qemus() == []
    assert (home.run_folder / "a").exists() == (words[0] == "stop")


@needs_qemu
def test_force_ends_a_start_that_does_not_even_notice(home: Home):
    home.project.create(MachineSpec(name="a"))
    starter = home.start("start", "a")
    home.booting("a")
    os.kill(starter.pid, signal.SIGSTOP)
    began = time.monotonic()
    done = home("rm", "--force", "a")
    assert time.monotonic() - began < SOON_S
    assert done.returncode == 0, done.stderr
    assert "still held it; SIGTERM was sent" in done.stderr
    starter.communicate(timeout=SOON_S)
    assert starter.returncode == -signal.SIGTERM
    assert home.qemus() == []
    assert list(home.run_folder.iterdir()) == []


@needs_qemu
def test_force_ends_a_run_that_hangs_and_takes_its_machine_along(home: Home):
    runner = home.start("run", "--name", "a")
    home.booting("a")
    done = home("stop", "--force", "a")
    assert done.returncode == 0, done.stderr
    runner.communicate(timeout=SOON_S)
    assert runner.returncode == 125, "it is none of the guest's"
    assert list(home.run_folder.iterdir()) == []


@pytest.fixture
def bound(home: Home) -> MachineRecord:
    """Of a machine `a` of this process, with a bind that is copied."""
    record = home.project.create(MachineSpec(name="a"), owner=os.getpid()).place.record()
    assert record is not None
    bind = BindRecord(host=str(home.root / "b"), guest="/b", how="rsync")
    return Machine(home.config, "a").place.write(msgspec.structs.replace(record, ready=True, binds=[bind]))


def test_force_waits_for_nobody_who_copies_binds(home: Home, bound: MachineRecord, capsys: pytest.CaptureFixture[str]):
    machine = Machine(home.config, bound.name)
    began = time.monotonic()
    with lock(machine.folder / "binds.lock", "the binds", timeout_s=0):
        machine.remove(force=True)
    assert time.monotonic() - began < SOON_S
    assert not machine.folder.exists()
    assert "is copying; waiting" in (said := "".join(capsys.readouterr()))
    assert f"warning: machine a: --bind {home.root}/b:/b: newer files in the guest could not be copied back" in said


@needs_qemu
def test_stop_reaches_its_ladder_also_when_binds_cannot_even_be_locked(home: Home, alone: int):
    machine = Machine(home.config, "a")
    record = machine.place.record()
    assert record is not None
    bind = BindRecord(host=str(home.root / "b"), guest="/b", how="rsync")
    machine.place.write(msgspec.structs.replace(record, ready=True, binds=[bind]))
    (machine.folder / "binds.lock").mkdir()
    done = home("stop", "a", "--timeout", "0.5")
    assert done.returncode == 0, done.stderr
    assert "could not be copied back" in done.stderr
    assert alone not in home.qemus()


@pytest.mark.parametrize("noted", cases("start", more=["command line", "file"]))
def test_a_holder_that_is_not_proven_is_never_signalled(home: Home, noted: str):
    """The note beside the lock names a process that is somebody else now, or that has not the lock."""
    machine = Machine(home.config, home.project.create(MachineSpec(name="a")).name)
    with subprocess.Popen(["sleep", "300"]) as other, machine.place.lock(0):
        note = machine.place.lock_file.with_suffix(".owner")
        _, _, digest = note.read_text().split()[1:]  # ours
        until(lambda: processes.command_line(other.pid).startswith("sleep"), "its program")
        real = home_of(other.pid)
        given = {"start": ("1", real[1]), "command line": (real[0], digest), "file": real}[noted]
        note.write_text(f"process {other.pid}\n{given[0]}\n{given[1]}\n")
        done = home("stop", "--force", "a")
        assert done.returncode == 1
        assert "machine a is locked by process" in done.stderr
        assert other.poll() is None
        other.kill()


def home_of(pid: int) -> tuple[str, str]:
    """Start and digest of a process, as the note beside a lock has them."""
    from vmtasks.host.locks import Holder  # noqa: PLC0415

    found = Holder.of(pid)
    return found.started, found.command_sha256


# -- reaping


def dead(home: Home, name: str) -> Machine:
    """A machine whose command is gone."""
    with subprocess.Popen(["sleep", "300"]) as owner:
        made = home.project.create(MachineSpec(name=name), owner=owner.pid)
        owner.kill()
    return made


def as_nobody(work: Callable[[], object]) -> object:
    """Do it in a child that is another user; returns what it gave, as JSON can hold it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            answer = work()
        except BaseException as error:  # noqa: BLE001 - the parent must hear of it
            answer = f"{type(error).__name__}: {error}"
        os.write(sink, json.dumps(answer).encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as told:
        answer = json.loads(told.read())
    os.waitpid(child, 0)
    return answer


def heard_by(said: list[str], work: Callable[[], list[str]]) -> list[str]:
    """Do it, and have what is told."""
    with progress.observing(progress.Lines(said.append)):
        return work()


@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["open", "private"])
def test_what_another_user_left_is_a_warning_and_keeps_nobody_from_work(home: Home, mode: int):
    """As one `sudo vmtasks run` that was killed leaves it in somebody's project."""
    left = dead(home, "a")
    with left.place.lock(0):
        pass
    left.folder.chmod(mode)
    os.chown(home.run_folder, NOBODY, NOBODY)

    def work() -> list[object]:
        said: list[str] = []
        gone = heard_by(said, home.project.reap)
        return [gone, said, home.project.names(), home.project.machine("a").status().status]

    gone, said, names, status = as_nobody(work)
    assert (gone, names) == ([], ["a"])
    if mode == 0o755:
        (warning,) = said
        assert warning.startswith(
            "warning: machine a has expired and could not be removed: machine a cannot be locked: "
        )
        assert "of user root: Permission denied" in warning
        assert "as root (sudo)" in warning
        assert status == "stopped"
    else:
        assert (said, status) == ([], "damaged")
    said = []
    assert heard_by(said, home.project.reap) == ["a"]
    assert said == ["machine a: removed, because the command that owned it is gone"]
    assert list(home.run_folder.iterdir()) == []


def test_a_lock_that_another_user_left_without_a_machine_is_passed_over(home: Home):
    home.run_folder.mkdir(exist_ok=True)
    (home.run_folder / ".tiny-1.lock").touch(0o644)
    (home.run_folder / "b").mkdir()
    os.chown(home.run_folder, NOBODY, NOBODY)
    assert as_nobody(home.project.reap) == []


def test_one_machine_that_cannot_be_removed_does_not_keep_the_others(home: Home):
    stuck, after = dead(home, "a"), dead(home, "b")
    said: list[str] = []
    with mounted_tmpfs(stuck.folder / "sessions", "64k"):
        assert heard_by(said, home.project.reap) == ["b"]
        assert not after.folder.exists()
        assert any(line.startswith("warning: machine a has expired and could not be removed: ") for line in said), said
        done = home("ps")
        assert done.returncode == 0
        assert "warning: machine a has expired" in done.stderr
    assert heard_by(said, home.project.reap) == ["a"]


@pytest.mark.parametrize("name", [".new-", ".new-x-1", ".new-99999999999999999999-a", ".b.lock", ".c", "file"])
def test_odd_names_in_the_folder_of_machines_harm_nobody(home: Home, name: str):
    home.run_folder.mkdir(exist_ok=True)
    (home.run_folder / name).touch()
    done = home("ps")
    assert (done.returncode, done.stdout) == (0, "NAME  IMAGE  STATUS  UP  PORTS  SESSIONS\n")


def test_a_machine_that_is_just_being_made_is_left_alone(home: Home):
    made = Machine(home.config, "a")
    made.folder.mkdir(parents=True)
    with made.place.lock(0):
        assert home.project.reap() == []
        assert made.folder.is_dir()
        refused = home("run", "-d", "--name", "a")
        assert "there is a machine 'a' already" in refused.stderr, "its folder is empty, and taken"
        assert made.folder.is_dir()
    assert home.project.reap() == []
    assert not made.folder.exists()
    assert list(home.run_folder.iterdir()) == []


def test_another_machine_of_the_same_name_is_never_reaped(home: Home, monkeypatch: pytest.MonkeyPatch):
    """Who saw that the first is over may come to remove it when the next of that name is made: it must ask again."""
    over = dead(home, "a")
    record = over.place.record()
    assert record is not None
    path, read, reads = over.folder / "machine.toml", files.read_text, []
    ours = msgspec.structs.replace(record, owner=os.getpid(), owner_started=processes.started(os.getpid()))

    def read_and_make_the_next(file: Path, errors: str = "strict") -> str:
        text = read(file, errors)
        if file == path:
            reads.append(text)
            if len(reads) == 2:  # the first time to open the machine, the second to ask whether it is over
                over.place.write(ours)
        return text

    monkeypatch.setattr(files, "read_text", read_and_make_the_next)
    assert home.project.reap() == []
    assert len(reads) > 2
    assert over.place.record() == ours
    over.remove()


# -- a name is taken, or it is not


def test_only_a_name_that_is_taken_is_called_taken(home: Home):
    home.run_folder.mkdir(exist_ok=True)
    (home.run_folder / "a").touch()
    with pytest.raises(NotADirectoryError):
        home.project.create(MachineSpec(name="a"))
    with pytest.raises(OSError, match="name too long"):
        home.project.create(MachineSpec(name="a" * 300))
    (home.run_folder / "tiny-1").touch()
    with pytest.raises(NotADirectoryError):
        home.project.create(MachineSpec())
    (home.run_folder / "tiny-1").unlink()
    assert [home.project.create(MachineSpec()).name for _ in range(2)] == ["tiny-1", "tiny-2"]
    with pytest.raises(StateError, match="there is a machine 'tiny-1' already"):
        home.project.create(MachineSpec(name="tiny-1"))
    assert not list(home.run_folder.glob(".new-*"))


# -- folders


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_a_machines_folder_is_its_owners_alone(home: Home):
    own, projects = home.project.create(MachineSpec(name="a")), Machine(home.config, "b")
    overlay.make(projects.place, "clean")
    by_hand = Machine(home.config, "c")
    life.prepare_install(by_hand.place, "root")
    for machine in (own, projects, by_hand):
        assert stat.S_IMODE(machine.folder.stat().st_mode) == 0o700


def test_a_look_at_a_machine_makes_no_folder_of_sockets(home: Home, monkeypatch: pytest.MonkeyPatch):
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    machine = home.project.create(MachineSpec(name="a"))
    assert machine.status().status == "stopped"
    assert machine.place.qmp.parent == machine.place.sockets
    assert list(short.iterdir()) == []
    machine.place.open_sockets()
    assert stat.S_IMODE(machine.place.sockets.stat().st_mode) == 0o700
    shutil.rmtree(short)


@needs_qemu
def test_a_launched_qemu_is_no_zombie_after_its_end(tmp_path: Path):
    """Also in a program that starts nothing more: `Popen` itself reaps only when the next process is made."""
    given = spec(tmp_path, sector(hang()), throwaway=False)
    pid = vm.launch(given, tmp_path / "log")
    os.kill(pid.number, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid.number}").exists(), "its zombie to be reaped", 10)
    shutil.rmtree(given.qmp_socket.parent)


# -- rm --all


def test_rm_all_leaves_the_projects_own_machine_and_what_may_be_it(home: Home):
    overlay.make(Machine(home.config).place, "clean")
    overlay.make(Machine(home.config, "second").place, "clean")
    for name in ("a", "b", "c"):
        home.project.create(MachineSpec(name=name))
    (home.run_folder / "c" / "machine.toml").write_text("")
    done = home("rm", "--all", "--force")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-2:] == ["machine a: removed", "machine b: removed"]
    assert home.project.names() == ["c", "second", "tiny"]
    done = home("rm", "--all", "--force")
    assert "there are no machines of `vmtasks run`; nothing was removed" in done.stderr
    assert home("rm", "--force", "tiny", "second", "c").returncode == 0
    assert home.project.names() == []


# -- the store's key pair


@pytest.mark.parametrize(
    "damaged", [b"", b"ssh-ed25519 AAAAC3Nz", bytes(range(256)), None], ids=["empty", "cut", "binary", "gone"]
)
def test_a_public_key_that_cannot_be_read_is_made_anew(tmp_path: Path, damaged: bytes | None):
    """What is rendered would hold it, and nobody could log in to what is installed so."""
    home = Home(tmp_path)
    builder = Builder(home.config)
    builder.make_key()
    public = builder.public_key.read_text()
    builder.public_key.unlink()
    if damaged is not None:
        builder.public_key.write_bytes(damaged)
    builder.render(3)
    assert builder.public_key.read_text().split()[:2] == public.split()[:2]
    key = public.split()[1]
    assert any(key in path.read_text() for path in builder.folder(3).iterdir())
