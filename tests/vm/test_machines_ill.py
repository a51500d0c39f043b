"""A machine that is ill: doctor, start and ssh say what is wrong with it; the stop ladder goes as far as it must."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Cli

from conftest import Project, until

pytestmark = pytest.mark.timeout(900)

SSHD_OFF = "doas sh -c 'kill $(pidof sshd)'"
LONGEST_S = 180.0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Cli]:
    """A project without a machine."""
    made = Cli(Project(tmp_path_factory.mktemp("ill") / "project", store))
    yield made
    made("rm", "--all", "--force")
    made.nothing_left()


@pytest.fixture(scope="module")
def cli(alone: Cli) -> Cli:
    """With a machine."""
    alone.make("box")
    return alone


@pytest.fixture
def box(cli: Cli) -> Cli:
    """With a machine that is well."""
    if cli.machine("box")["status"] != "running":
        cli("stop", "--force", "box")
        cli.good("start", "box")
    return cli


def said_by(cli: Cli, *words: str) -> str:
    """What a command says that must fail in good time."""
    began = time.monotonic()
    done = cli(*words)
    assert time.monotonic() - began < LONGEST_S
    assert done.returncode != 0, done.stdout
    return done.stdout.decode() + done.stderr.decode()


def failed(cli: Cli) -> tuple[str, str]:
    """The layer at which doctor stops, and why."""
    began = time.monotonic()
    done = cli("doctor", "box")
    assert time.monotonic() - began < LONGEST_S
    assert done.returncode == 1, done.stdout
    (line,) = [line for line in done.stdout.decode().splitlines() if line.startswith("✗")]
    name, _, why = line[2:].partition(": ")
    return name, why


@pytest.mark.exhaustive
def test_b34_all_layers_pass(box: Cli) -> None:
    layers = box.json("doctor", "box")
    names = ["record", "process", "QMP", "console", "port", "banner", "authentication", "command"]
    assert [layer["name"] for layer in layers] == names  # type: ignore[attr-defined]
    assert all(layer["passed"] for layer in layers)  # type: ignore[attr-defined]


def test_b34_the_host(alone: Cli) -> None:
    done = alone("doctor")
    for what in ("qemu-system-x86_64", "rsync", "accelerator", "store", "state", "ports"):
        assert f" {what}: " in done.stdout.decode()


@pytest.mark.exhaustive
def test_b31_the_cpu_is_paused(box: Cli) -> None:
    which = box.good("exec", "-d", "box", "sh", "-c", "sleep 20; echo went on too").strip()
    config = str(box.machine("box")["ssh_config"])
    subprocess.run(["ssh", "-F", config, "-O", "exit", "box"], check=False, timeout=30)
    other = subprocess.Popen(["ssh", "-F", config, "-N", "box"], stdin=subprocess.DEVNULL)
    until(lambda: subprocess.run(["ssh", "-F", config, "-O", "check", "box"], check=False).returncode == 0, 60, "it")
    box.good("pause", "box")
    try:
        name, why = failed(box)
        assert (name, why.partition(":")[0]) == ("QMP", "paused")
        assert "its CPU is paused" in said_by(box, "start", "box")
        assert box.machine("box")["status"] == "paused"
        assert "nothing in the guest can answer" in said_by(box, "ssh", "box", "--", "-o", "ControlPath=none", "true")
        # The connection that all share is somebody else's, who used plain ssh.
        waits = [("ssh", "box", "echo went on"), ("attach", "box", which), ("cp", "box:/etc/hostname", "copied")]
        waiting = [box.start(*words) for words in waits]
        for one in waiting:
            assert one.stderr is not None
            assert select.select([one.stderr], [], [], 15)[0], "said at once, not when a connection is given up"
            assert (
                b"its CPU is paused, so that nothing in the guest can answer; vmtasks resume box"
                in one.stderr.readline()
            )
    finally:
        box.good("resume", "box")
    assert [one.communicate(timeout=60)[0] for one in waiting] == [b"went on\n", b"went on too\n", b""]
    other.kill()
    other.wait()
    box.good("pause", "box")
    output = box("stop", "box").stderr.decode()
    assert "stopped (power off in the guest)" in output, "it went on for that"


@pytest.mark.exhaustive
def test_b38_a_session_outlives_a_pause(box: Cli) -> None:
    session = box.start("ssh", "box", "sleep 5; echo woke")
    time.sleep(2)
    box.good("pause", "box")
    time.sleep(30)
    box.good("resume", "box")
    assert session.communicate(timeout=60)[0] == b"woke\n"
    assert session.returncode == 0


@pytest.mark.exhaustive
def test_k4_b31_no_ssh_server_answers(box: Cli) -> None:
    def gone() -> bool:
        box("ssh", "box", SSHD_OFF)
        return box("ssh", "box", "--", "-o", "ControlPath=none", "true").returncode == 255

    until(gone, 60, "the end of sshd")
    subprocess.run(["ssh", "-F", str(box.machine("box")["ssh_config"]), "-O", "exit", "box"], check=False, timeout=30)
    name, why = failed(box)
    assert name == "banner"
    assert "no SSH server answers in the guest" in why
    assert box("wait", "box", "--timeout", "5").returncode == 1
    assert "did not accept SSH within" in said_by(box, "start", "box")
    # Nobody can power it off from inside; the button still does it.
    output = box("stop", "box").stderr.decode()
    assert "stopped (ACPI power button)" in output


@pytest.mark.exhaustive
def test_k17_k27_a_guest_that_heeds_nobody(box: Cli) -> None:
    cli = box
    deaf = "echo exit 0 >/tmp/deaf; chmod 755 /tmp/deaf; mount --bind /tmp/deaf /sbin/poweroff; kill $(pidof acpid)"
    cli.good("exec", "--user", "root", "box", "sh", "-c", deaf)
    output = cli("stop", "box", "--timeout", "4").stderr.decode()
    assert "stopped (QMP quit): the guest did not power off" in output
    assert not cli.project.qemus()


@pytest.mark.exhaustive
def test_b31_output_that_nobody_reads_ends_the_command(box: Cli) -> None:
    """As a shell would: the client of a server that does not hear of it would wait for ever."""
    endless = box.start("ssh", "box", "yes")
    assert endless.stdout is not None
    assert endless.stdout.readline() == b"y\n"
    endless.stdout.close()
    assert endless.wait(30) == 128 + signal.SIGPIPE


@pytest.mark.exhaustive
def test_b31_the_kernel_panicked_and_qemu_was_killed(box: Cli) -> None:
    session = box.start("ssh", "box", "echo in; sleep 300")
    assert session.stdout is not None
    assert session.stdout.readline() == b"in\n"
    quiet = subprocess.DEVNULL
    box.start("ssh", "box", "doas sh -c 'sync; echo c >/proc/sysrq-trigger'", stdout=quiet, stderr=quiet)
    until(lambda: failed_layer(box) == "QMP", 90, "the panic")
    _, why = failed(box)
    assert "the guest's kernel panicked" in why
    assert [layer["verdict"] for layer in cli_layers(box) if layer["passed"] is False] == ["panicked"]
    assert "panicked" in said_by(box, "start", "box")
    assert box.machine("box")["status"] == "panicked"
    (pid,) = box.project.qemus()
    os.kill(pid, signal.SIGKILL)
    assert session.wait(90) == 255
    session.communicate()
    name, why = failed(box)
    assert name == "process"
    assert f"QEMU, process {pid}, is gone" in why
    assert "its process ended without being stopped" in said_by(box, "ssh", "box", "true")
    assert box.machine("box")["status"] == "stale"


def failed_layer(cli: Cli) -> str:
    return next((layer["name"] for layer in cli_layers(cli) if layer["passed"] is False), "")


def cli_layers(cli: Cli) -> list[dict[str, object]]:
    return list(json.loads(cli("doctor", "box", "--json").stdout))


@pytest.mark.exhaustive
def test_b7_a_machine_that_is_stopped_says_so(cli: Cli) -> None:
    cli("stop", "--force", "box")
    began = time.monotonic()
    assert "machine box is not running: it is stopped" in cli.bad("ssh", "box", "true")
    assert "it is stopped" in failed(cli)[1]
    assert time.monotonic() - began < 30
    assert "not running" in cli("stop", "box").stderr.decode()
