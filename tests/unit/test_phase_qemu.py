"""The phase engine when QEMU itself does not start, is killed or stopped, or has no room; and QEMU after us."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from phaserun import TOKEN, Went, failed, machine, needs_qemu, runner

from bootsector import hang, phase, sector, write_disk
from vmtasks.errors import MachineError
from vmtasks.host import processes
from vmtasks.images.judge import Limits
from vmtasks.qemu import argv, vm

pytestmark = needs_qemu


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Went]]:
    with runner(tmp_path, monkeypatch) as boot:
        yield boot


# ---- from outside


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "signal 9 (Killed)"), (signal.SIGTERM, "status 0 (host-signal)")]
)
def test_qemu_is_killed(number: signal.Signals, how: str, run):
    went = run(
        sector(phase(TOKEN, verdict=None, power=False), hang()),
        meanwhile=lambda went: os.kill(went.pid, number),
        after="one",
    )
    failed(went, "qemu-died", f"QEMU ended with {how} while the guest was running at step 'one'")
    assert went.took_s < 4


def test_qemu_is_killed_after_a_good_verdict(run):
    went = run(
        sector(phase(TOKEN, power=False), hang()), meanwhile=lambda went: os.kill(went.pid, signal.SIGKILL), after="one"
    )
    failed(went, "qemu-died", "QEMU ended with signal 9 (Killed) while the guest was running at step 'one'")


def test_qemu_stops_answering(run):
    """A stopped process neither talks nor answers: the phase ends all the same, and so does QEMU."""
    went = run(
        sector(phase(TOKEN, verdict=None, power=False), hang()),
        meanwhile=lambda went: os.kill(went.pid, signal.SIGSTOP),
        after="one",
        limits=Limits(5, silence_s=1.5, poweroff_s=60),
    )
    failed(went, "silence", "the console was silent for 1.5 s at step 'one'")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_the_host_has_no_space_left(run, tmp_path: Path):
    with small_disk(tmp_path / "full", "600k") as folder:
        went = run(
            sector(
                phase(TOKEN, verdict=None, power=False),
                *(write_disk(b"x" * 512, lba=128 * n) for n in range(1, 15)),
                hang(),
            ),
            disk=folder / "disk.qcow2",
        )
    failed(went, "host-disk", "QEMU could not write the guest's disk: no space left on this host at step 'one'")


# ---- QEMU itself


def test_qemu_that_does_not_start_says_why_at_once(run, tmp_path: Path):
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"^QEMU did not start: .*unsupported machine type") as caught:
        run(b"", machine_type="no-such-machine")
    assert caught.value.log == tmp_path / "qemu.log"
    with pytest.raises(MachineError, match=r"^QEMU did not start: .*no.iso.*No such file"):
        run(b"", cds=(tmp_path / "no.iso",))
    assert time.monotonic() - began < 5


def test_qemu_that_dies_late_is_not_waited_for(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a busy host QEMU takes a while to find out what is wrong."""
    slow = tmp_path / "bin" / argv.PROGRAM
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nsleep 1\necho too late >&2\nexit 1\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"^QEMU did not start: too late\n"):
        run(b"")
    assert time.monotonic() - began < 5


def test_a_screenshot_of_what_the_guest_shows(tmp_path: Path):
    spec = machine(tmp_path, sector(hang()))
    with vm.boot(spec, tmp_path / "qemu.log") as booted:
        assert booted.control.screenshot(tmp_path / "screen.png")
        assert not booted.control.screenshot(tmp_path / "no/such/folder.png")
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(spec.qmp_socket.parent)


CHILD = """
    import sys, time
    sys.path[:0] = {path!r}
    from pathlib import Path
    from bootsector import hang, sector
    from phaserun import machine
    from vmtasks.qemu import vm
    folder = Path({folder!r})
    with vm.boot(machine(folder, sector(hang())), folder / "qemu.log") as booted:
        print(booted.process.pid, flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_qemu_is_gone_soon_after_we_were_killed(tmp_path: Path):
    text = textwrap.dedent(CHILD).format(
        path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=str(tmp_path)
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert "qemu" in processes.command_line(pid)
        parent.kill()
        parent.wait()
    end = time.monotonic() + 2
    while processes.started(pid):
        assert time.monotonic() < end, "QEMU outlives us"
        time.sleep(0.02)


def test_sockets_of_a_killed_process_are_removed():
    with vm.temporary_sockets() as first:
        dead = first.with_name("p999999999-x")
        dead.mkdir()
        with vm.temporary_sockets() as second:
            assert first.is_dir()
            assert second.is_dir()
            assert not dead.exists()
            assert second.stat().st_mode & 0o777 == 0o700
    assert not first.exists()
    assert not second.exists()


def test_a_killed_qemu_is_there_until_its_sockets_and_locks_are_free(tmp_path: Path):
    for count in range(4):
        folder = tmp_path / str(count)
        folder.mkdir()
        spec = machine(folder, sector(hang()), memory=256 << 20)
        pid, mark = vm.launch(spec, folder / "log"), str(spec.qmp_socket)
        os.kill(pid.number, signal.SIGKILL)
        while pid.alive(mark):
            pass
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(mark)
        shutil.rmtree(spec.qmp_socket.parent)
