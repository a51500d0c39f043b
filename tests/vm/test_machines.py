"""A machine's life: start, look, stop, restore, snapshot, remove; and what is not ours is left alone."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amount import cases
from conftest import Project, copy_store, until

pytestmark = pytest.mark.timeout(600)

RUNNING, BOOTING, STOPPED, STALE, ABSENT = 0, 11, 4, 5, 6
"""Exit statuses of `doit status`."""


NOBODY = {"PATH": os.environ["PATH"], "SSH_ASKPASS_REQUIRE": "never"}
"""For an ssh that may ask for a password and finds nobody to ask."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Project]:
    """One machine for many tests; each finds it running."""
    made = Project(tmp_path_factory.mktemp("machines") / "project", store)
    yield made
    made.clean_up()


@pytest.fixture
def running(shared: Project) -> Project:
    """The shared machine, running."""
    shared.doit("start").good()
    return shared


@pytest.fixture
def stopped(shared: Project) -> Project:
    """The shared machine, at rest, and not for the first time."""
    if not disk(shared).exists():
        shared.doit("start").good()
    shared.doit("stop").good()
    return shared


def status(project: Project, expected: int) -> str:
    """What `doit status` says, which must end with the expected status."""
    ended = project.doit("status", timeout_s=60)
    assert ended.status == expected, ended.output
    return ended.output


def disk(project: Project) -> Path:
    return project.state / "run/tiny/disk.qcow2"


def image_info(path: Path) -> dict[str, object]:
    """What qemu-img knows of an image, also of one in use."""
    out = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", path])
    return dict(json.loads(out))


def backing(project: Project) -> Path:
    """The image that the machine's disk stands on."""
    return Path(str(image_info(disk(project))["full-backing-filename"]))


def forge(project: Project, **values: object) -> None:
    """Change keys of the machine's record."""
    path = project.state / "run/tiny/machine.toml"
    text = path.read_text()
    for key, value in values.items():
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {json.dumps(value)}", text)
    path.write_text(text)


@pytest.mark.exhaustive
def test_status_has_five_answers(project: Project) -> None:
    assert "absent" in status(project, ABSENT)
    run = project.start("start")
    until(project.qemus, 60, "QEMU")
    until(lambda: (project.state / "run/tiny/tiny.ports").exists() or run.process.poll() is not None, 60, "a record")
    assert "is booting" in status(project, BOOTING)
    run.wait().good()
    shown = status(project, RUNNING)
    assert f"127.0.0.1:{project.port}" in shown
    (pid,) = project.qemus()
    assert f"pid {pid}" in shown
    os.kill(pid, signal.SIGKILL)
    until(lambda: not project.qemus(), 10, "QEMU to end")
    assert "stale" in status(project, STALE)
    project.doit("start").good()
    assert project.qemus() != [pid]
    assert project.ssh("true").returncode == 0
    project.doit("stop").good()
    assert "stopped" in status(project, STOPPED)
    assert project.qemus() == []


def test_a_second_start_finds_the_first(running: Project) -> None:
    before = running.qemus()
    output = running.doit("start").good()
    assert f"is running (pid {before[0]}" in output
    assert running.qemus() == before


def test_only_our_key_lets_in(running: Project, tmp_path: Path) -> None:
    """The machine's own: neither another nor the one that its image lets in."""
    key, image = tmp_path / "key", running.store / "keys/snapshots" / str(running.machine()["image"])
    assert image.read_bytes() == (running.store / "keys/id_ed25519").read_bytes()
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config = running.state / "run/tiny/ssh_config"
    password = ["-o", "PubkeyAuthentication=no", "-o", "PasswordAuthentication=yes", "-o", "BatchMode=no"]
    only = ["-o", "IdentitiesOnly=yes", "-i"]
    for options in ([*only, key], [*only, image], password):
        own = re.sub(r".*IdentityFile.*\n", "", config.read_text()).replace("PasswordAuthentication no", "")
        (tmp_path / "config").write_text(own.replace("BatchMode yes", ""))
        words = ["ssh", "-F", tmp_path / "config", "-o", "ControlPath=none", *options, "tiny", "true"]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60, env=NOBODY
        )
        assert done.returncode == 255
        assert "Permission denied (publickey" in done.stderr


def test_ssh_ends_as_the_command_does(running: Project) -> None:
    assert running.ssh("exit 7").returncode == 7
    login = subprocess.run(
        [sys.executable, "-m", "doit", "ssh"],
        input=b"exit 9\n",
        cwd=running.root,
        env=running.env(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert login.returncode == 9, login.stdout + login.stderr


@pytest.mark.exhaustive
def test_stop_is_gentle_and_leaves_a_clean_disk(running: Project) -> None:
    running.ssh("echo kept >kept; sync")
    assert "stopped (power off in the guest)" in running.doit("stop").good()
    assert "not running" in running.doit("stop").good()
    checked = subprocess.run(["qemu-img", "check", disk(running)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    running.doit("start").good()
    assert running.ssh("cat kept").stdout == "kept\n"
    # The state at the last mount, as the kernel found it: it says so where it has to recover.
    journal = running.ssh("doas dmesg | grep -i ext4").stdout
    assert "mounted filesystem" in journal
    assert "recover" not in journal
    assert "not cleanly" not in journal


def test_the_port_of_another(tmp_path: Path, store: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        project = Project(tmp_path / "project", store)
        project.port = listener.getsockname()[1]
        output = project.doit("start").bad()
        assert f"port {project.port} is taken by " in output
        assert f"(pid {os.getpid()})" in output
        assert re.search(r"doit port=2222\d start", output)
        assert "port=auto" in output
        assert project.qemus() == []
    project.clean_up()


@pytest.mark.exhaustive
def test_port_auto_takes_a_free_one(tmp_path: Path, store: Path) -> None:
    """2222, or one of the ten that are kept for this; whoever else uses this host may hold some of them."""
    project = Project(tmp_path / "project", store)
    try:
        project.doit("port=auto", "start").good()
        assert project.machine()["ssh_port"] in (2222, *range(22220, 22230))
        assert project.ssh("true").returncode == 0
    finally:
        project.clean_up()


@pytest.mark.exhaustive
def test_another_host_key_is_refused(stopped: Project) -> None:
    right = stopped.machine()["host_keys"]
    wrong = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIII"
    path = stopped.state / "run/tiny/machine.toml"
    path.write_text(path.read_text().replace(right[0], wrong))  # type: ignore[index]
    try:
        output = stopped.doit("start").bad()
    finally:
        path.write_text(path.read_text().replace(wrong, right[0]))  # type: ignore[index]
    assert "which is not pinned" in output
    assert stopped.qemus() == []


@pytest.mark.exhaustive
def test_a_machine_of_before_machines_had_an_identity_starts_as_it_did(stopped: Project) -> None:
    """Its card keeps the address that its guest may have written down; its host keys are replaced."""
    path = stopped.state / "run/tiny/machine.toml"
    text = re.sub(r"(?m)^(mac|identity) = .*\n", "", path.read_text())
    assert "mac" not in text
    path.write_text(text)
    before = stopped.machine()["host_keys"]
    stopped.doit("start").good()
    assert stopped.ssh("cat /sys/class/net/eth0/address").stdout == "52:54:00:12:34:56\n"
    after = stopped.machine()
    assert after["identity"] == "own"
    assert after["host_keys"] != before
    shown = stopped.ssh("cut -d' ' -f1,2 /etc/ssh/ssh_host_*_key.pub").stdout.splitlines()
    assert shown == after["host_keys"]
    stopped.doit("stop").good()


@pytest.mark.parametrize("known", ["pid", "pid and start"])
def test_a_process_that_is_not_ours_is_left_alone(stopped: Project, known: str) -> None:
    """As after a restart of the host: the number of our QEMU belongs to somebody else now."""
    with subprocess.Popen(["sleep", "300"]) as other:
        try:
            began = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
            forge(stopped, pid=other.pid, pid_started=began if known == "pid and start" else "1")
            (stopped.state / "run/tiny/tiny.pid").write_text(f"{other.pid}\n")
            status(stopped, STALE)
            stopped.doit("stop").good()
            assert other.poll() is None
            status(stopped, STOPPED)
        finally:
            other.kill()


def saved_and_restored(project: Project, name: str) -> Path:
    """Save the disk, go back to clean and then to what was saved: its image, which needs no other."""
    project.doit("snapshot", "--name", name).good()
    project.doit("restore").good()
    assert backing(project) == project.image(3), "clean is clean"
    project.doit("restore", "--name", name).good()
    saved = backing(project)
    assert saved.parent == project.store / "images"
    assert "backing-filename" not in image_info(saved)
    return saved


def test_a_snapshot_is_saved_and_restored_and_stands_alone(stopped: Project) -> None:
    saved_and_restored(stopped, "early")
    output = stopped.doit("restore", "--name", "none-such").bad()
    assert "there is no snapshot 'none-such' of tiny; there is: clean, early" in output
    stopped.doit("restore", "--name", "clean").good()


@pytest.mark.exhaustive
def test_snapshots_come_back_with_what_was_written(running: Project) -> None:
    output = running.doit("snapshot", "--name", "never").bad()
    assert "is running: its disk is in use" in output
    running.ssh("echo one >marker")
    running.doit("stop").good()
    saved = saved_and_restored(running, "one")
    # Saved once more from a machine that stands on the snapshot, under the same name.
    running.doit("start").good()
    assert running.ssh("cat marker").stdout == "one\n"
    running.ssh("echo two >marker")
    running.doit("stop").good()
    running.doit("snapshot", "--name", "one").good()
    running.doit("start").good()
    running.doit("restore", "--name", "one").good()
    running.doit("start").good()
    assert running.ssh("cat marker").stdout == "two\n"
    assert backing(running) not in (saved, disk(running))
    running.doit("restore", "--name", "clean").good()


@pytest.mark.exhaustive
def test_a_guest_that_powers_itself_off_is_started_again(running: Project) -> None:
    (pid,) = running.qemus()
    running.ssh("doas poweroff")
    until(lambda: not running.qemus(), 60, "QEMU to end")
    status(running, STALE)
    running.doit("start").good()
    assert running.qemus() != [pid]


@pytest.mark.parametrize("state", cases("stopped", more=["running"]))
def test_destroy_asks_first(request: pytest.FixtureRequest, state: str) -> None:
    project: Project = request.getfixturevalue(state)
    output = project.doit("destroy").bad()
    assert "nothing was removed" in output
    assert "--yes" in output
    assert disk(project).exists()
    assert state == "stopped" or project.ssh("true").returncode == 0
    output = project.doit("destroy", "--yes").good()
    assert "disk.qcow2" in output
    assert not (project.state / "run/tiny").exists()
    assert project.qemus() == []
    assert "nothing was removed" in project.doit("destroy", "--yes").good()


@pytest.mark.exhaustive
def test_a_project_and_a_store_with_names_that_need_quoting(tmp_path: Path, store: Path) -> None:
    """A phase, a machine, rsync and a suite: each passes the names on in a way of its own."""
    other = copy_store(store, tmp_path / 'the "store", it\'s 100%', images=True)
    odd = Project(tmp_path / 'it\'s a "project", 100% of it', other)
    try:
        odd.append("phases/tiny/3-provision.sh.j2", "#\n")
        output = odd.doit("quick").good()
        assert [boot.phase for boot in odd.boots()] == ["3-provision"]
        assert "14 passed" in output
        assert odd.ssh("true").returncode == 0
    finally:
        odd.clean_up()
