"""The SSH client against a real server in a real guest: C1, C2, C6 to C8 and C11 of docs/parity.md."""

import hashlib
import io
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from remotes import LIMIT_S, Guest, until_true

from amount import cases
from vmtasks.errors import (
    AuthFailedError,
    BannerError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    ConnectRefusedError,
    HostKeyError,
)
from vmtasks.guest import channels, client, files
from vmtasks.guest.ssh import Target

pytestmark = pytest.mark.timeout(600)

ODD = ["it's", 'a "b"', "$HOME `id` $(id)", "back\\slash \\n", "!x", "a\nb\n\nc", "é€😀", "-n", "", "*", "%s", "#"]
NAMES = cases('it\'s "quoted"\n$HOME é€😀', more=["two words", "a\nb", "-n", "100%", "*"])
MIB = 1 << 20


@pytest.fixture
def ssh(guest: Guest) -> Iterator[client.Connection]:
    """With a shell that waits: what a first command does is seen in every other test, and in tests/unit."""
    with guest.connect() as connection:
        connection.execute("true", timeout_s=LIMIT_S)
        yield connection


def other(target: Target, **changes: Any) -> Target:
    return replace(target, **changes)


# ---- C1: connections


@pytest.mark.parametrize("kind", cases("ed25519", more=["ecdsa", "rsa"]))
def test_c1_each_kind_of_key_opens_the_door_and_the_agent_holds_encrypted_ones(
    guest: Guest, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "secret", "-f", key], check=True)
    public = key.with_suffix(".pub").read_text()
    with guest.connect() as door:
        door.execute("cat >>.ssh/authorized_keys", stdin=public.encode(), timeout_s=LIMIT_S)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "nobody"))
    with pytest.raises(AuthFailedError, match="is encrypted, and no agent holds it"):
        client.connect(other(guest.target, key=key), timeout_s=LIMIT_S)
    socket = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL) as agent:
        try:
            until_true(socket.exists, "the agent")
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
            answer = tmp_path / "answer"
            answer.write_text("#!/bin/sh\necho secret\n")
            answer.chmod(0o755)
            asks = {"SSH_ASKPASS": str(answer), "SSH_ASKPASS_REQUIRE": "force"}
            subprocess.run(["ssh-add", "-q", key], env={**os.environ, **asks}, check=True, stdin=subprocess.DEVNULL)
            with client.connect(other(guest.target, key=key), timeout_s=LIMIT_S) as door:
                assert door.execute("echo in", timeout_s=LIMIT_S).stdout == b"in\n"
        finally:
            agent.terminate()
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "secret", "-N", "", "-f", key], check=True)
    with client.connect(other(guest.target, key=key), timeout_s=LIMIT_S) as door:
        assert door.execute("echo in", timeout_s=LIMIT_S).stdout == b"in\n"


def test_c1_failures_have_errors_of_their_own(guest: Guest, tmp_path: Path) -> None:
    target = guest.target
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    stranger = (tmp_path / "other.pub").read_text().rsplit(" ", 1)[0]
    cases = [
        (other(target, key=tmp_path / "other"), AuthFailedError, "does not let dev in"),
        (other(target, user="nobody-such"), AuthFailedError, "does not let nobody-such in"),
        (other(target, key=tmp_path / "none"), AuthFailedError, "does not exist"),
        (other(target, host_keys=(stranger,)), HostKeyError, "which is not pinned"),
        (other(target, host_keys=()), HostKeyError, "no host key is recorded"),
        (other(target, port=1), ConnectRefusedError, "refused the connection"),
    ]
    for wrong, error, says in cases:
        with pytest.raises(error, match=says) as caught:
            client.connect(wrong, timeout_s=LIMIT_S, console=guest.console)
        assert caught.value.console == tuple(guest.console())
        assert "last lines of the console:" in str(caught.value)
    with guest.paused(), pytest.raises(BannerError, match="nothing behind it spoke"):
        client.connect(target, timeout_s=2)


def test_c2_a_guest_that_falls_silent_is_noticed(guest: Guest) -> None:
    with guest.connect(keepalive_s=0.5) as connection:
        time.sleep(1.5)
        assert connection.is_connected(), "keepalives are answered"
        with guest.paused():
            until_true(lambda: not connection.is_connected(), "the end of the connection", 30)
        with pytest.raises(ConnectionLostError) as lost:
            connection.execute("true", timeout_s=LIMIT_S)
        assert not lost.value.started


# ---- C6: commands


def test_c6_streams_are_apart_and_exact(ssh: client.Connection) -> None:
    done = ssh.execute("printf 'a\\n'; printf 'b\\n' >&2; printf 'no end'", timeout_s=LIMIT_S)
    assert (done.stdout, done.stderr, done.status) == (b"a\nno end", b"b\n", 0)
    noise = os.urandom(70_000)
    assert ssh.execute("cat; cat /dev/null >&2", stdin=noise, timeout_s=LIMIT_S).stdout == noise
    assert ssh.execute(["wc", "-c"], timeout_s=LIMIT_S).stdout == b"0\n", "no input is no input"
    assert ssh.execute(["cat"], stdin=io.BytesIO(noise), timeout_s=LIMIT_S).stdout == noise


@pytest.mark.exhaustive
def test_c6_lines_come_as_they_are_written(ssh: client.Connection) -> None:
    seen: list[tuple[str, str, float]] = []
    text = "echo é1; sleep 1; echo 2 >&2; sleep 1; printf 'half'; sleep 1; printf ' and half'"
    ssh.execute(text, timeout_s=LIMIT_S, on_line=lambda line, stream: seen.append((line, stream, time.monotonic())))
    assert [entry[:2] for entry in seen] == [("é1", "stdout"), ("2", "stderr"), ("half and half", "stdout")]
    assert seen[2][2] - seen[0][2] > 1, "not all at the end"


def test_c6_words_arrive_as_they_are(ssh: client.Connection) -> None:
    expected = "".join(f"<{word}>" for word in ODD).encode()
    for _ in range(2):  # the first command of a connection goes another way than the next
        assert ssh.execute(["printf", "<%s>", *ODD], timeout_s=LIMIT_S).stdout == expected
    long = ["printf", "<%s>", *ODD, "x" * 20_000]
    assert ssh.execute(long, timeout_s=LIMIT_S).stdout == expected + b"<" + b"x" * 20_000 + b">"
    env = {f"V{n}": word for n, word in enumerate(ODD)}
    text = "pwd; " + "; ".join(f'printf "<%s>" "$V{n}"' for n in range(len(ODD)))
    done = ssh.execute(text, env=env, cwd="/tmp", timeout_s=LIMIT_S)  # noqa: S108 - in the guest
    assert done.stdout == b"/tmp\n" + expected
    assert ssh.execute("id -un; pwd", user="root", timeout_s=LIMIT_S).stdout == b"root\n/home/dev\n"
    assert ssh.execute('echo "$# $0"', timeout_s=LIMIT_S).stdout == b"0 sh\n"
    for wrong in ([], ["a\0b"], "a\0b"):
        with pytest.raises(ConfigError):
            ssh.execute(wrong, timeout_s=LIMIT_S)
    with pytest.raises(ConfigError, match="environment variable"):
        ssh.execute("true", env={"A=B": "c"}, timeout_s=LIMIT_S)


@pytest.mark.parametrize("status", cases(0, 1, 255, more=[42, 126, 127, 128, 137]))
def test_c11_every_status_comes_back(ssh: client.Connection, status: int) -> None:
    done = ssh.execute(f"exit {status}", timeout_s=LIMIT_S)
    assert (done.status, done.signal) == (status, "")


def test_c11_a_signal_is_not_a_status(ssh: client.Connection) -> None:
    for name in ("KILL", "TERM", "INT", "SEGV"):
        done = ssh.execute(["sh", "-c", f"kill -{name} $$"], timeout_s=LIMIT_S)
        assert (done.status, done.signal) == (128 + getattr(signal, f"SIG{name}"), name)
    done = ssh.execute(["no-such-program"], timeout_s=LIMIT_S)
    assert done.status == 127
    assert b"no-such-program" in done.stderr


@pytest.mark.exhaustive
def test_a_shell_waits_for_the_next_command_but_not_for_long(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting() -> list[str]:
        words = guest.target.argv("""ps -o pid,args | awk 'index($0, "vmtasks_line |" "| exit") { print $1 }'""")
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout.split()

    with guest.connect(keepalive_s=1) as connection:
        assert waiting() == []
        connection.execute("cd /; export A=1; umask 0; true", timeout_s=LIMIT_S)
        until_true(waiting, "a shell to wait")
        (first,) = waiting()
        done = connection.execute('echo $$ "$PWD" "$A" $(umask)', timeout_s=LIMIT_S).stdout.decode()
        assert done == f"{first} /home/dev  0022\n", "it ran in that shell, which knows nothing of the one before"
        until_true(waiting, "the next shell to wait")
        (second,) = waiting()
        guest.root(f"kill -KILL {second}")
        assert connection.execute("echo fine", timeout_s=LIMIT_S).stdout == b"fine\n"
        until_true(waiting, "the next shell to wait")
        monkeypatch.setattr(channels, "SHELL_MAX_AGE_S", 1.0)
        until_true(lambda: waiting() == [], "it to be dismissed")
        assert connection.execute("echo fine", timeout_s=LIMIT_S).stdout == b"fine\n"
    until_true(lambda: waiting() == [], "all to be gone with the connection")


@pytest.mark.exhaustive
def test_commands_from_several_threads(ssh: client.Connection) -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = [f"echo {number}; exit {number}" for number in range(24)]
        ends = list(pool.map(lambda text: ssh.execute(text, timeout_s=LIMIT_S), texts))
    assert [(end.stdout, end.status) for end in ends] == [(b"%d\n" % number, number) for number in range(24)]


@pytest.mark.exhaustive
def test_c6_ten_mebibytes_on_both_streams_at_once(ssh: client.Connection) -> None:
    sizes, digests = {"stdout": 0, "stderr": 0}, {}
    for stream in sizes:
        digests[stream] = hashlib.sha256()

    def count(data: bytes, stream: str) -> None:
        sizes[stream] += len(data)
        digests[stream].update(data)

    text = f"head -c {10 * MIB} /dev/zero & yes err | head -c {10 * MIB} >&2; wait"
    done = ssh.execute(text, timeout_s=240, on_data=count, keep=False)
    assert (done.status, done.stdout, sizes) == (0, b"", {"stdout": 10 * MIB, "stderr": 10 * MIB})
    assert digests["stdout"].digest() == hashlib.sha256(bytes(10 * MIB)).digest()
    assert digests["stderr"].digest() == hashlib.sha256(b"err\n" * (10 * MIB // 4)).digest()


@pytest.mark.exhaustive
def test_c6_waiting_costs_next_to_nothing(ssh: client.Connection) -> None:
    ssh.execute("true", timeout_s=LIMIT_S)
    before, began = time.process_time(), time.monotonic()
    ssh.execute("sleep 3", timeout_s=LIMIT_S)
    assert (time.process_time() - before) / (time.monotonic() - began) < 0.05


# ---- C7, C8: deadlines, and what a loss means


def left_of(ssh: client.Connection, mark: str) -> str:
    return ssh.execute(f"ps -o pid,stat,args | grep '[s]leep {mark}' || true", timeout_s=LIMIT_S).stdout.decode()


@pytest.mark.parametrize("user", cases("root", more=[""]))
def test_c7_deadlines_end_all_that_a_command_has_started(ssh: client.Connection, user: str) -> None:
    text = "echo begun; trap '' TERM; sleep 4711 & sleep 4711 | sleep 4711"
    with pytest.raises(CommandTimeoutError, match="it was ended") as late:
        ssh.execute(text, user=user, timeout_s=1.5)
    assert (late.value.which, late.value.stdout) == ("overall", b"begun\n")
    assert left_of(ssh, "4711") == ""
    ticks = "for n in 1 2 3 4; do echo $n; sleep 0.5; done; sleep 4712"
    with pytest.raises(CommandTimeoutError, match=r"said nothing for 1\.5 s; it was ended") as late:
        ssh.execute(ticks, user=user, timeout_s=LIMIT_S, idle_s=1.5)
    assert (late.value.which, late.value.stdout) == ("idle", b"1\n2\n3\n4\n"), "it lived longer than that"
    assert left_of(ssh, "4712") == ""
    assert ssh.execute("kill 0; exit 3", timeout_s=LIMIT_S).signal == "TERM", "its group is not the server's"
    assert ssh.execute("echo on", timeout_s=LIMIT_S).stdout == b"on\n"


@pytest.mark.exhaustive
def test_c7_a_deadline_holds_also_when_the_guest_hangs(guest: Guest) -> None:
    with guest.connect() as connection:
        connection.execute("true", timeout_s=LIMIT_S)
        with guest.paused():
            began = time.monotonic()
            with pytest.raises(CommandTimeoutError, match=r"may still run|in time"):
                connection.execute("sleep 4713", timeout_s=2)
            assert time.monotonic() - began < 60


def test_c8_a_lost_connection_is_neither_a_timeout_nor_a_status(guest: Guest) -> None:
    with guest.connect() as connection, pytest.raises(ConnectionLostError, match="is not known") as lost:
        # Whoever answers us is the parent of the group's leader.
        connection.execute("echo begun; sleep 1; doas kill -9 $PPID; sleep 60", timeout_s=LIMIT_S)
    assert lost.value.started
    assert lost.value.stdout == b"begun\n"


# ---- files


@pytest.mark.parametrize("name", NAMES)
def test_files_go_and_come_back_with_any_name(guest: Guest, name: str, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / name).write_bytes(data)
    (tmp_path / name).chmod(0o755)
    files.put(guest.target, tmp_path / name, f"/tmp/{name}")  # noqa: S108 - in the guest
    files.put(guest.target, tmp_path / name, name)
    (tmp_path / "back").mkdir()
    back = files.get(guest.target, name, tmp_path / "back")
    assert back == tmp_path / "back" / name
    assert (back.read_bytes(), back.stat().st_mode & 0o777) == (data, 0o755)
    with guest.connect() as connection:
        listing = connection.execute("ls -A /tmp | grep -c vmtasks-", timeout_s=LIMIT_S).stdout
        assert listing == b"0\n", "nothing is left beside"


def test_files_that_cannot_be_written_or_read(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for dest in ("/no/such/place", "/root/file", "/etc"):
        with pytest.raises(files.CommandError, match=re.escape(f"tiny:{dest}")):
            files.put(guest.target, tmp_path / "file", dest)
    (tmp_path / "kept").write_text("kept")
    for source in ("/no/such/file", "/etc"):
        with pytest.raises(files.CommandError, match=re.escape(f"tiny:{source}")):
            files.get(guest.target, source, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "kept"
    files.put(guest.target, tmp_path / "file", "/tmp/mode", mode=0o600)  # noqa: S108
    with guest.connect() as connection:
        assert connection.execute(["stat", "-c", "%a", "/tmp/mode"], timeout_s=LIMIT_S).stdout == b"600\n"  # noqa: S108


# ---- terminals


def test_a_terminal_that_python_types_on(guest: Guest) -> None:
    """More: tests/unit/test_terminal.py."""
    with guest.connect() as connection:
        with connection.open_terminal(user="root", columns=132, rows=43) as terminal:
            terminal.send("stty size; id -un; tty\r")
            shown = terminal.read_until("/dev/pts/", timeout_s=LIMIT_S).splitlines()
            assert [line for line in shown if line in ("43 132", "root")] == ["43 132", "root"]
            terminal.resize(90, 30)
            # One foreground job from before the answer: between two commands of a line, ^C is the shell's own.
            terminal.send("sh -c 'stty size; exec sleep 4714'\r")
            terminal.read_until("30 90", timeout_s=LIMIT_S)
            terminal.send("\x03")
            terminal.read_until("^C", timeout_s=LIMIT_S)
            terminal.send("exit 7\r")
            assert terminal.wait(timeout_s=LIMIT_S) == 7
        with connection.open_terminal("echo ready; sleep 4715") as terminal:
            terminal.read_until("ready", timeout_s=LIMIT_S)
        command = "pgrep -f 'sleep 471[5]'"
        until_true(lambda: connection.execute(command, timeout_s=LIMIT_S).status != 0, "its program to be hung up")


# ---- what a suite puts into PATH


@pytest.mark.parametrize(
    "line",
    cases(
        "ar",
        "make -f rules",
        more=["sh -c ar", "env ar", "echo | xargs ar", "find /bin/sh -exec ar ';'", "timeout 60 ar"],
    ),
)
def test_what_stands_in_path_runs_and_not_an_applet(line: str, ssh: client.Connection) -> None:
    """As a suite's own stubs do, or binutils: the tiny guest's busybox has an `ar` too."""
    script = "mkdir -p stubs && cd stubs && printf '#!/bin/sh\\necho mine\\n' >ar && chmod 755 ar && "
    script += "printf 'all:\\n\\t@ar\\n' >rules && PATH=$PWD:$PATH && " + line
    done = ssh.execute(f"/bin/sh -c {shlex.quote(script)}", timeout_s=LIMIT_S)
    assert (done.status, done.stdout) == (0, b"mine\n"), done.stderr
