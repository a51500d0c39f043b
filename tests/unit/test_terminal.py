"""A terminal that Python types on: a real pty behind an SSH server of this host. A real guest: test_remote.py."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machines_ill import until

from unit.shellserver import serving
from vmtasks.errors import CommandTimeoutError, ConfigError, ConnectionLostError
from vmtasks.guest import connect
from vmtasks.guest.client import Connection

LIMIT_S = 20.0


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    with serving(tmp_path / "home") as target, connect.connect(target, timeout_s=LIMIT_S) as connection:
        yield connection


def test_what_is_typed_is_read_and_the_status_comes_back(connection: Connection):
    with connection.open_terminal("read name; echo hello, $name; exit 3") as terminal:
        terminal.send("dev\r")
        assert terminal.read_until("hello, dev", timeout_s=LIMIT_S).split() == ["dev", "hello,", "dev"]
        assert terminal.wait(timeout_s=LIMIT_S) == 3
        assert terminal.read(timeout_s=LIMIT_S) == b""


def test_its_size_can_be_changed(connection: Connection):
    script = "trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 0.1; done"
    with connection.open_terminal(script, columns=132, rows=43) as terminal:
        assert terminal.read_until("ready", timeout_s=LIMIT_S).split() == ["43", "132", "ready"]
        terminal.resize(90, 30)
        assert "30 90" in terminal.read_until("30 90", timeout_s=LIMIT_S)


def test_a_login_shell_is_the_default(connection: Connection):
    with connection.open_terminal(cwd="/", env={"MINE": "it's \n two"}) as terminal:
        terminal.send('pwd; printf "%s|" "$MINE"; exit\r')
        shown = terminal.read_until("two|", timeout_s=LIMIT_S).replace("\r\n", "\n")
        assert shown.endswith("/\nit's \n two|")
        assert terminal.wait(timeout_s=LIMIT_S) == 0


def test_bytes_pass_unchanged_and_much_at_once(connection: Connection):
    with connection.open_terminal("stty raw -echo; echo ready; head -c 1000000 | sha256sum; echo done") as terminal:
        terminal.read_until("ready", timeout_s=LIMIT_S)
        data = bytes(range(256)) * 4000
        terminal.send(data[:1_000_000])
        assert len(terminal.read_until("done", timeout_s=LIMIT_S).split()[0]) == 64


def test_silence_is_a_timeout_and_ends_nothing(connection: Connection):
    with connection.open_terminal("echo first; read more; echo $more") as terminal:
        with pytest.raises(CommandTimeoutError, match="did not show 'second' within 0") as late:
            terminal.read_until("second", timeout_s=0.5)
        assert late.value.stdout == b"first\r\n"
        with pytest.raises(CommandTimeoutError, match="showed nothing for 0"):
            terminal.read(timeout_s=0.2)
        terminal.send("second\r")
        assert terminal.read_until("second", timeout_s=LIMIT_S)


def test_a_program_that_reads_nothing_is_a_timeout(connection: Connection):
    with connection.open_terminal("stty raw -echo; echo ready; sleep 60") as terminal:
        terminal.read_until("ready", timeout_s=LIMIT_S)
        with pytest.raises(CommandTimeoutError, match="read nothing for 0"):
            terminal.send(bytes(16 << 20), timeout_s=0.5)


def test_one_thread_reads_while_another_types(connection: Connection):
    with connection.open_terminal("stty -echo; echo ready; cat") as terminal, ThreadPoolExecutor(1) as other:
        terminal.read_until("ready", timeout_s=LIMIT_S)
        resized = other.submit(lambda: [terminal.resize(80, n + 10) for n in range(20)])
        with pytest.raises(CommandTimeoutError, match="showed nothing"):
            terminal.read(timeout_s=0.3)
        resized.result()
        reading = other.submit(terminal.read_until, "line 99", timeout_s=LIMIT_S)
        for number in range(100):
            terminal.send(f"line {number}\r")
        assert reading.result().split() == [word for n in range(100) for word in ("line", str(n))]


def test_a_program_that_ends_too_soon_is_told_with_what_it_said(connection: Connection):
    with (
        connection.open_terminal("echo no; exit 1") as terminal,
        pytest.raises(ConnectionLostError, match="ended without showing 'yes'") as lost,
    ):
        terminal.read_until("yes", timeout_s=LIMIT_S)
    assert lost.value.stdout == b"no\r\n"


def test_closing_it_hangs_up_its_programs(connection: Connection, tmp_path: Path):
    with connection.open_terminal(
        "trap 'echo hup >gone; exit' HUP; echo ready; while :; do sleep 0.1; done"
    ) as terminal:
        terminal.read_until("ready", timeout_s=LIMIT_S)
    until((tmp_path / "home/gone").exists, "its program to be hung up")
    with pytest.raises(ConnectionLostError, match="nothing can be typed"):
        terminal.send("x")
    with pytest.raises(ConnectionLostError, match="has no size"):
        terminal.resize(80, 24)


def test_a_lost_connection_is_no_status(connection: Connection):
    with connection.open_terminal("echo ready; sleep 60") as terminal:
        terminal.read_until("ready", timeout_s=LIMIT_S)
        began = time.monotonic()
        connection.close()
        with pytest.raises(ConnectionLostError, match="is not known"):
            terminal.wait(timeout_s=LIMIT_S)
        assert time.monotonic() - began < LIMIT_S / 2


def test_commands_and_several_terminals_share_the_connection(connection: Connection):
    with connection.open_terminal("read a; echo one $a") as one, connection.open_terminal("read a; echo two $a") as two:
        assert connection.execute("echo three", timeout_s=LIMIT_S).stdout == b"three\n"
        two.send("x\r")
        one.send("y\r")
        assert one.read_until("one y", timeout_s=LIMIT_S)
        assert two.read_until("two x", timeout_s=LIMIT_S)


def test_a_command_that_is_too_long_is_refused(connection: Connection):
    with pytest.raises(ConfigError, match="too long"):
        connection.open_terminal("true " + "x" * 10_000)
