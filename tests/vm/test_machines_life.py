"""Machines come and go: each way out of `vmtasks run`, ports, names, pids, snapshots; and nothing stays behind."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import termios
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from machines import RANGE, Cli, digest, held, here, login, make_key, range_alone, sockets

from conftest import Project, free_port, until
from vmtasks.errors import HostKeyError
from vmtasks.guest.link import Link
from vmtasks.images.workspace import PhaseRecord
from vmtasks.machines import MachineSpec
from vmtasks.machines import Project as Machines
from vmtasks.media import disk
from vmtasks.qemu import vm
from vmtasks.store.records import ImageRecord, write_record
from vmtasks.store.store import Store

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def cli(tmp_path: Path, store: Path) -> Iterator[Cli]:
    """A project without a machine, which must be so again at the end."""
    made = Cli(Project(tmp_path / "project", store))
    (made.run_folder).mkdir(exist_ok=True)
    before = sockets()
    yield made
    made("rm", "--all", "--force")
    made.nothing_left()
    assert not [name for name in sockets() - before if any_of(made, name)]


def any_of(cli: Cli, name: str) -> bool:
    """Whether a socket folder is of this project; others test at the same time."""
    return any(vm.socket_place(cli.run_folder / other).name == name for other in ("tiny-1", "tiny-2", "a", "b", "c"))


def files(cli: Cli) -> set[str]:
    """All files of the project's state folder that may not grow."""
    kept = re.compile(r"access\.log|doit\.sqlite3.*|tiny/.*")
    every = (str(path.relative_to(cli.project.state)) for path in cli.project.state.rglob("*"))
    return {path for path in every if not kept.fullmatch(path)}


# -- session-coupled


def test_b6_b10_b15_b41_run_a_command_and_be_gone(cli: Cli) -> None:
    before = files(cli)
    words = ["--user", "root", "--network", "none", "--ssh-port", str(free_port())]
    with here() as port:
        reach = f"wget -T 3 -qO- http://10.0.2.2:{port}/ || echo cut off"
        done = cli("run", *words, "--", f"id -un; echo err >&2; touch kept; {reach}; exit 42")
    assert done.returncode == 42, done.stderr
    assert done.stdout == b"root\ncut off\n"
    assert b"err\n" in done.stderr
    assert files(cli) == before
    assert cli.json("ps") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_b8_c_signals(cli: Cli, number: signal.Signals) -> None:
    run = cli.start("run", "--name", "a", "--ssh-port", str(free_port()))
    until(lambda: cli.project.qemus() or run.poll() is not None, 60, "QEMU")
    os.kill(run.pid, number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == -number, err
    assert b"Traceback" not in err
    assert out == b""
    cli.nothing_left()


@pytest.mark.exhaustive
def test_b8_c_a_signal_in_the_session(cli: Cli) -> None:
    run = cli.start("run", "--name", "a", "--ssh-port", str(free_port()), "--", "echo in; sleep 300")
    assert run.stdout is not None
    assert run.stdout.readline() == b"in\n"
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM
    cli.nothing_left()


def test_b8_c_its_terminal_is_closed(cli: Cli) -> None:
    master, slave = pty.openpty()
    run = cli.start(
        "run", "--name", "a", "--ssh-port", str(free_port()), stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    until(lambda: cli.project.qemus() or run.poll() is not None, 60, "QEMU")
    said = os.read(master, 1 << 16) if select.select([master], [], [], 0)[0] else b""
    os.close(master)
    assert run.wait(60) == -signal.SIGHUP, said
    cli.nothing_left()


@pytest.mark.parametrize("by", ["vmtasks", "doit"])
def test_b8_d_b42_killed_and_reaped_by_the_next_command(cli: Cli, by: str) -> None:
    before = files(cli)
    run = cli.start("run", "--name", "a", "--ssh-port", str(free_port()))
    until(lambda: cli.project.qemus() or run.poll() is not None, 60, "QEMU")
    run.kill()
    run.communicate(timeout=30)
    until(lambda: not cli.project.qemus(), 10, "the kernel to end QEMU")
    assert (cli.run_folder / "a").exists()
    if by == "doit":
        assert "machine a: removed" in cli.project.doit("stop").output
        assert not (cli.run_folder / "a").exists()
    assert cli.json("ps") == []
    assert files(cli) == before


@pytest.mark.exhaustive
def test_b8_b_a_boot_that_fails_is_explained_and_gone(cli: Cli) -> None:
    """A disk with nothing on it."""
    cli.project.edit("phases/tiny/guest.toml", "ready_timeout_s = 20", "ready_timeout_s = 1")
    broken = blank_image(cli)
    said = cli.bad("run", f"tiny:{broken}", "--ssh-port", str(free_port()))
    assert "did not accept SSH within" in said
    log = re.search(r"log: (.*)", said)
    assert log is not None
    assert Path(log[1]).is_file()
    cli.nothing_left()


def blank_image(cli: Cli) -> str:
    """A snapshot of an empty disk; returns its name."""
    private = cli.project.root / "store"
    store = Store(private)
    shutil.copytree(cli.project.store / "keys", private / "keys")
    shutil.copy2(cli.project.store / "accel.json", private / "accel.json")
    digest = "b" * 64
    (private / "images").mkdir(parents=True)
    disk.create(store.partial(digest), 1 << 30)
    made = store.publish(
        digest,
        lambda stat, sha256: ImageRecord(
            digest=digest, guest="tiny", version="", name="blank", size=stat.st_size, mtime_ns=stat.st_mtime_ns,
            sha256=sha256, virtual_size=1 << 30, ssh_user="dev", host_keys=["ssh-ed25519 AAAA"],
        ),
    )  # fmt: skip
    write_record(cli.project.tiny / "snapshots/blank.toml", PhaseRecord(digest=digest, sha256=made.sha256))
    cli.project.store = private
    return "blank"


# -- named


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
def test_b1_b5_b9_b13_cycles_leave_nothing(cli: Cli) -> None:
    cycles = 50
    fingerprints = set()
    before = files(cli)
    keys = set((cli.project.store / "keys").glob("*"))
    image = digest(cli.project.image(3))
    for _ in range(cycles):
        cli.make("a")
        first = cli.good("ssh", "a", "cat /proc/sys/kernel/random/boot_id")
        assert cli.good("ssh", "a", "cat /proc/sys/kernel/random/boot_id") == first, "it outlives a session"
        fingerprints.add((cli.run_folder / "a" / "id_ed25519.pub").read_text())
        assert "running: a; nothing was removed" in cli.bad("rm", "a")
        assert cli("rm", "--force", "a").stderr == b"machine a: removed\n"
        cli.nothing_left()
        assert files(cli) == before
    assert len(fingerprints) == cycles
    assert digest(cli.project.image(3)) == image
    assert set((cli.project.store / "keys").glob("*")) == keys


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_b4_several_at_once_share_nothing(cli: Cli) -> None:
    many = 8
    with range_alone(), ThreadPoolExecutor(many) as threads:
        names = [text.strip() for text in threads.map(lambda _: cli.good("run", "-d", "--rm"), range(many))]
        assert len(set(names)) == many
        shown = [cli.machine(name) for name in names]
        records = [tomllib.loads((cli.run_folder / name / "machine.toml").read_text()) for name in names]
        assert len({record["ssh_port"] for record in records}) == many
        assert {record["ssh_port"] for record in records} <= {2222, *RANGE}
        assert len({str(item["key"]) for item in shown}) == many
        assert len({(cli.run_folder / name / "id_ed25519").read_bytes() for name in names}) == many
        assert len({item["pid"] for item in shown}) == many
        refused = login(cli, names[0], Path(str(shown[1]["key"])), "true")
        assert refused.returncode == 255
        assert b"Permission denied" in refused.stderr
        for name in names:
            cli.good("stop", "--force", name)
    cli.nothing_left()


@pytest.mark.exhaustive
def test_k29_b3_snapshots_of_a_machine_with_its_own_key(cli: Cli) -> None:
    saved(cli)
    fsck(cli, "a")
    assert [item["image"] for item in cli.json("snapshots")] == ["tiny:clean", "tiny:one"]  # type: ignore[attr-defined]
    cli.good("rm", "--force", "a")
    done = cli("run", "tiny:one", "--ssh-port", str(free_port()), "--", "cat marker; cat .ssh/authorized_keys")
    assert done.stdout.startswith(b"one\nssh-ed25519 ")
    assert done.stdout.count(b"ssh-ed25519") == 1
    said = cli.bad("run", "tiny:none-such")
    assert "there is no snapshot 'none-such' of tiny" in said
    assert "hint: vmtasks snapshots tiny" in said


@pytest.mark.exhaustive
def test_k29_back_to_a_snapshot_after_its_key_was_rotated(cli: Cli) -> None:
    saved(cli)
    cli.good("start", "a")
    cli.good("ssh", "a", "rm marker; sync")
    cli.good("keys", "rotate", "a")
    cli.good("restore", "--yes", "a", "one")
    cli.good("start", "a")
    assert cli.good("ssh", "a", "cat marker") == "one\n"
    assert cli.good("keys", "list", "a").count("ssh-ed25519") == 1


def saved(cli: Cli) -> None:
    """A stopped machine `a`, and its snapshot `one`."""
    cli.make("a")
    cli.good("ssh", "a", "echo one >marker; sync")
    assert "is running: its disk is in use" in cli.bad("snapshot", "a", "one")
    assert "stopped (power off in the guest)" in cli("stop", "a").stderr.decode()
    cli.good("snapshot", "a", "one")


def fsck(cli: Cli, name: str) -> None:
    """The file system on the machine's disk was left clean."""
    raw = cli.project.root / "raw"
    subprocess.run(
        ["qemu-img", "convert", "-O", "raw", cli.run_folder / name / "disk.qcow2", raw], check=True, timeout=120
    )
    e2fsck = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if e2fsck is None:
        pytest.skip("e2fsck is not installed")
    done = subprocess.run(
        [e2fsck, "-fn", f"{raw}?offset={1 << 20}"], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "recovering journal" not in done.stdout + done.stderr
    raw.unlink()


def test_names_are_taken_once(cli: Cli) -> None:
    (cli.run_folder / "a").mkdir()
    (cli.run_folder / "a" / "machine.toml").write_text("")
    assert "there is a machine 'a' already" in cli.bad("run", "-d", "--name", "a")
    shutil.rmtree(cli.run_folder / "a")
    assert "--disk 1M: less than the image's 1G" in cli.bad("run", "--disk", "1M", status=2)


@pytest.mark.exhaustive
def test_k13_folder_name_and_port_from_the_environment(cli: Cli) -> None:
    port = free_port()
    env = {**cli.env(), "VM_DIR": "vms", "VM_NAME": "server", "SSH_PORT": str(port)}
    cli.project.doit("auto_install", env=env).good()
    cli.env = lambda: env  # type: ignore[method-assign]
    try:
        line = cli.good("start")
        assert (cli.project.root / "vms/run/server/server.ports").read_text() == f"ssh,{port}\n"
        assert subprocess.run(["sh", "-c", f"{line.strip()} true"], check=False, timeout=60).returncode == 0
        assert cli.good("start") == line
    finally:
        cli.good("rm", "--force", "server")
    assert not (cli.project.root / "vms/run/server").exists()


# -- identity

WHO = "hostname; cat /sys/class/net/eth0/address; cut -d' ' -f1,2 /etc/ssh/ssh_host_*_key.pub"


def record(cli: Cli, name: str) -> dict[str, object]:
    return tomllib.loads((cli.run_folder / name / "machine.toml").read_text())


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_each_machine_has_a_name_an_address_and_host_keys_of_its_own(cli: Cli) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(cli.make, ("a", "b")))
    seen = {name: cli.good("ssh", name, WHO).splitlines() for name in ("a", "b")}
    known = {name: record(cli, name) for name in ("a", "b")}
    for name in ("a", "b"):
        assert seen[name] == [name, known[name]["mac"], *known[name]["host_keys"]]  # type: ignore[misc]
    assert not set(seen["a"]) & set(seen["b"])
    shown = Machines(cli.project.root, cli.env()).machine("a")
    with pytest.raises(HostKeyError, match="which is not pinned"):  # as when "b" had come after "a" on its port
        Link(replace(shown.require_running(), port=int(str(known["b"]["ssh_port"])))).open()
    elsewhere = ["-o", "ControlPath=none", "-p", str(known["b"]["ssh_port"]), "a", "true"]
    ssh = subprocess.run(["ssh", "-F", shown.folder / "ssh_config", *elsewhere], capture_output=True, check=False)
    assert ssh.returncode == 255
    assert b"Host key verification failed" in ssh.stderr
    cli.good("stop", "a")
    cli.good("start", "a")
    assert cli.good("ssh", "a", WHO).splitlines() == seen["a"]


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_killed_while_a_machine_gets_its_own_keys(cli: Cli) -> None:
    """Whatever stands in the guest by then, the next command gets in, and still by a host key that is on record.

    The first time it gets a login key of its own as well. Later it is told that its host keys are its image's.
    """
    path = cli.run_folder / "a" / "machine.toml"
    start = ["run", "-d", "--name", "a", "--ssh-port", str(free_port())]
    for late_s in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2):
        run = cli.start(*start)
        until(lambda: 'identity = "changing"' in read(path) or run.poll() is not None, 300, "the change")  # noqa: B023
        time.sleep(late_s)
        run.kill()
        run.communicate()
        assert record(cli, "a")["identity"] in ("changing", "own")
        assert cli.good("ssh", "a", WHO).splitlines()[2:] == record(cli, "a")["host_keys"]
        after = record(cli, "a")
        assert (after["identity"], after["key"], len(after["host_keys"])) == ("own", "own", 1)  # type: ignore[arg-type]
        assert cli.good("ssh", "a", "cat .ssh/authorized_keys").count("ssh-ed25519") == 1
        start = ["ssh", "a", "true"]
        text = path.read_text().replace('identity = "own"', 'identity = "image"')
        path.write_text(text.replace("ready = true", "ready = false"))


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_guests_that_cannot_have_host_keys_of_their_own(cli: Cli) -> None:
    """One has none where it says; the other's server shows the old ones until it boots next."""
    toml = "phases/tiny/guest.toml"
    cli.project.edit(toml, 'user = "dev"\n', 'user = "dev"\nhost_keys = "/etc/none"\n')
    start = ("run", "-d", "--name", "a", "--ssh-port", str(free_port()))
    said = cli(*start).stderr.decode()
    assert "keeps the SSH host keys of its image: there is no /etc/none/ssh_host_ed25519_key" in said
    assert record(cli, "a")["identity"] == "shared"
    assert cli.good("ssh", "a", WHO).splitlines()[2:] == record(cli, "a")["host_keys"]
    cli.good("rm", "--force", "a")
    key = "/etc/ssh/ssh_host_ed25519_key"
    cli.project.edit(toml, 'host_keys = "/etc/none"\n', f'reload = "mount -o bind /root/old {key}"\n')
    poweroff = 'poweroff = "/sbin/poweroff"\n'
    cli.project.edit(toml, poweroff, f'{poweroff}hostname = "cp -p {key} /root/old"\n')
    said = cli(*start).stderr.decode()
    assert "shows SSH host keys of its own from its next boot on" in said
    image, own = sorted(record(cli, "a")["host_keys"], key=lambda key: key in cli.good("ssh", "a", WHO))  # type: ignore[call-overload]
    cli.good("stop", "a")
    cli.good("start", "a")
    assert (record(cli, "a")["identity"], record(cli, "a")["host_keys"]) == ("own", [own])
    assert image not in cli.good("ssh", "a", WHO)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# -- ports and pids


def test_k5_the_port_of_another(cli: Cli) -> None:
    with range_alone(), held(22220):
        said = cli.bad("run", "--ssh-port", "22220")
        assert "port 22220 is taken by " in said
        assert re.search(r"--ssh-port 2222[1-9]", said)
    cli.nothing_left()


@pytest.mark.exhaustive
def test_k5_k11_all_ports_are_taken(cli: Cli) -> None:
    with range_alone(), held(2222, *RANGE):
        cli.good("run", "-d", "--rm", "--name", "a", "-p", "0:80")
        first, web = [item["host"] for item in cli.machine("a")["ports"]]  # type: ignore[attr-defined]
        assert first not in (2222, *RANGE, web)
        assert cli.good("ssh", "a", "echo in") == "in\n"
        said = cli.bad("run", "--ssh-port", "22221")
        ours = Path("/proc/self/comm").read_text().strip()
        assert f"port 22221 is taken by {ours} (pid {os.getpid()})" in said
        assert "--ssh-port auto" in said
    cli.good("stop", "--force", "a")
    cli.nothing_left()


def test_b17_a_forward_whose_port_is_taken(cli: Cli) -> None:
    port = free_port()
    with held(port):
        said = cli.bad("run", "--ssh-port", str(free_port()), "-p", f"{port}:80")
        assert f"port {port}, the host's side of a forward, is taken by " in said
    cli.nothing_left()


@pytest.mark.parametrize("known", ["pid", "pid and start"])
def test_k3_the_pid_of_somebody_else(cli: Cli, known: str) -> None:
    Machines(cli.project.root, cli.env()).create(MachineSpec(name="a"))
    record = cli.run_folder / "a" / "machine.toml"
    with subprocess.Popen(["sleep", "300"]) as other:
        began = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        text = re.sub(r"(?m)^pid = .*$", f"pid = {other.pid}", record.read_text())
        text = re.sub(r"(?m)^pid_started = .*$", f'pid_started = "{began if known != "pid" else 1}"', text)
        record.write_text(text)
        (cli.run_folder / "a" / "a.pid").write_text(f"{other.pid}\n")
        assert cli.machine("a")["status"] == "stale"
        assert "its process ended without being stopped" in cli.bad("ssh", "a", "true")
        doctor = cli("doctor", "a")
        assert doctor.returncode == 1
        assert b"another process has that pid now" in doctor.stdout
        cli.good("stop", "a")
        assert other.poll() is None
        assert cli.machine("a")["status"] == "stopped"
        other.kill()


def test_k24_b19_a_private_key_is_refused_and_copied_nowhere(cli: Cli, tmp_path: Path) -> None:
    make_key(tmp_path / "mine")
    secret = (tmp_path / "mine").read_text().splitlines()[1]
    said = cli.bad("run", "--ssh-key", str(tmp_path / "mine"), status=2)
    assert "this is a private key" in said
    assert secret not in said
    for path in cli.project.state.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()
    cli.nothing_left()
