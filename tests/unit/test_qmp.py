"""QEMU's control socket: a real QEMU without a machine answers."""

import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machines_ill import until

from vmtasks.errors import MachineError
from vmtasks.host import process
from vmtasks.qemu import qmp

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")


@pytest.fixture
def control_socket(tmp_path: Path) -> Iterator[Path]:
    """The control socket of a QEMU that runs as long as the test."""
    path = tmp_path / "q"
    argv = ["qemu-system-x86_64", "-machine", "none", "-S", "-display", "none", "-nodefaults"]
    with process.spawn([*argv, "-qmp", f"unix:{path},server=on,wait=off"]):
        with qmp.connect(path, timeout_s=30):
            pass
        yield path


def test_commands_and_their_errors(control_socket: Path):
    with qmp.connect(control_socket, timeout_s=5) as control:
        assert control.cmd("query-status")["status"] == "prelaunch"
        with pytest.raises(MachineError, match="did not carry out no-such-command"):
            control.cmd("no-such-command")
        assert control.events() == []
        began = time.monotonic()
        assert control.events(wait_s=0.2) == []
        assert time.monotonic() - began >= 0.2
        control.cmd("cont")
        assert [event["event"] for event in control.events(wait_s=5)] == ["RESUME"]
        control.cmd("stop")
        control.cmd("quit")
        until(lambda: [event["event"] for event in control.events()][-1:] == ["SHUTDOWN"], "its last event", 30)
        with pytest.raises(MachineError, match="did not carry out query-status"):
            control.cmd("query-status")


def test_who_is_not_served_is_told_so_in_time(control_socket: Path):
    """QEMU serves one client at a time; it owes the second its greeting."""
    with qmp.connect(control_socket, timeout_s=5):
        began = time.monotonic()
        with pytest.raises(MachineError, match="did not answer within 0 s"), qmp.connect(control_socket, timeout_s=0):
            pass
        assert time.monotonic() - began < 5
    assert qmp.status(control_socket) == "prelaunch"


def test_from_many_threads(control_socket: Path):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: qmp.status(control_socket), range(24))) == ["prelaunch"] * 24


def test_an_interrupt_at_any_moment_harms_no_later_connection(control_socket: Path):
    """As Ctrl-C does it: clean-up has to speak with QEMU after the signal has cut short a word with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    cut = 0
    try:
        for number in range(100):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 * (number + 1))
                for _ in range(20):
                    with qmp.connect(control_socket, timeout_s=5) as control:
                        control.cmd("query-status")
                    threading.Event().wait(0.0001)
            except KeyboardInterrupt:
                cut += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            until(lambda: qmp.status(control_socket) == "prelaunch", "QEMU, busy with who was cut off", 30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert cut == 100


def test_a_socket_without_qemu(tmp_path: Path):
    with (
        pytest.raises(MachineError, match="No such file"),
        qmp.connect(tmp_path / "none", timeout_s=0.2),
    ):
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    began = time.monotonic()
    with (
        pytest.raises(MachineError),
        qmp.connect(tmp_path / "none", timeout_s=60, ended=lambda: ended.poll() is not None),
    ):
        pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "closed its control socket"),
        (b"SSH-2.0-x\r\n", "does not speak QMP"),
        (b"\xff\xfe\n", "does not speak QMP"),
        (b"[1]\n", "does not speak QMP"),
        (b"[" * 100_000 + b"\n", "does not speak QMP"),
        (b'{"return": {}}\n', "not QEMU"),
        (b'{"QMP": {}}\n{"error": "no", "id": 1}\n', "no"),
        (b'{"QMP": {}}\n{"error": {"desc": "not now"}, "id": 1}\n', "not now"),
    ],
)
def test_what_is_not_qemu(said: bytes, why: str, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "q"))
        server.listen()

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(said)
                peer.shutdown(socket.SHUT_WR)
                peer.recv(4096)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(MachineError, match=why), qmp.connect(tmp_path / "q", timeout_s=0, ended=lambda: True):
            pass
