"""What a connection that fails says: real sockets, and paramiko's own server where a fault is needed."""

import io
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import paramiko
import pytest

from unit.shellserver import serving
from vmtasks.errors import (
    AuthFailedError,
    BannerError,
    CommandTimeoutError,
    ConnectionLostError,
    ConnectRefusedError,
    ConnectTimeoutError,
    HostKeyError,
    SshError,
)
from vmtasks.guest import client, login, ssh
from vmtasks.guest.ssh import Target
from vmtasks.guest.transport import Transport

LIMIT_S = 20.0


@pytest.fixture(scope="module")
def keys() -> dict[str, paramiko.PKey]:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    text = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return {
        "ecdsa": paramiko.ECDSAKey.generate(),
        "ed25519": paramiko.Ed25519Key.from_private_key(io.StringIO(text.decode())),
        "rsa": paramiko.RSAKey.generate(2048),
    }


@pytest.fixture
def key(keys: dict[str, paramiko.PKey], tmp_path: Path) -> Path:
    keys["rsa"].write_private_key_file(str(tmp_path / "key"))
    return tmp_path / "key"


def pin(*keys: paramiko.PKey) -> tuple[str, ...]:
    return tuple(f"{key.get_name()} {key.get_base64()}" for key in keys)


class Server(paramiko.ServerInterface):
    """A server that lets anybody in who is not `nobody`, and does with commands what the test says."""

    def __init__(self, on_exec: Callable[[paramiko.Channel, bytes], bool], delay_s: float) -> None:
        self._on_exec = on_exec
        self._delay_s = delay_s

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:  # noqa: ARG002
        time.sleep(self._delay_s)
        return paramiko.AUTH_FAILED if username == "nobody" else paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return self._on_exec(channel, command)


Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve SSH on a loopback port; returns the port."""
    listeners: list[socket.socket] = []

    def start(
        *host_keys: paramiko.PKey,
        on_exec: Callable[[paramiko.Channel, bytes], bool] = lambda *_: True,
        delay_s: float = 0.0,
        raw: Callable[[socket.socket], None] | None = None,
    ) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def loop() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                if raw:
                    threading.Thread(target=raw, args=(peer,), daemon=True).start()
                    continue
                transport = paramiko.Transport(peer)
                transport.set_log_channel("quiet")
                for one in host_keys:
                    transport.add_server_key(one)
                transport.start_server(event=threading.Event(), server=Server(on_exec, delay_s))

        threading.Thread(target=loop, daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.close()


def target(port: int, key: Path, *pinned: str, user: str = "dev") -> Target:
    return Target("vm", port, user, key, pinned, key.parent)


def hold(peer: socket.socket) -> None:
    time.sleep(30)
    peer.close()


def say(text: bytes, *, then_close: bool) -> Callable[[socket.socket], None]:
    def speak(peer: socket.socket) -> None:
        peer.sendall(text)
        if then_close:
            peer.recv(1000)
            peer.close()
        else:
            hold(peer)

    return speak


def offered(peer: socket.socket) -> list[str]:
    """How a client wants to exchange keys, first choice first; see RFC 4253, 7.1."""
    peer.sendall(b"SSH-2.0-x\r\n")
    with peer, peer.makefile("rb") as data:
        data.readline()
        packet = data.read(int.from_bytes(data.read(4)))
    begin = 1 + 1 + 16  # padding's length, kind, cookie
    return packet[begin + 4 : begin + 4 + int.from_bytes(packet[begin : begin + 4])].decode().split(",")


@pytest.mark.parametrize("by", ["paramiko", "OpenSSH"])
def test_the_quickest_key_exchange_is_the_first_choice_and_not_the_only_one(serve: Serve, key: Path, by: str):
    seen: list[list[str]] = []
    vm = target(serve(raw=lambda peer: seen.append(offered(peer))), key, "ssh-ed25519 AAAA")
    if by == "paramiko":
        with pytest.raises(SshError):
            client.connect(vm, timeout_s=20)
    else:
        ssh.write_config(vm)
        subprocess.run(vm.argv("true"), check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:  # the server may come to it after the client has given up
        time.sleep(0.01)
    (names,) = seen
    assert names[0].startswith("curve25519-sha256")
    assert "ecdh-sha2-nistp256" in names


@pytest.mark.parametrize(
    ("raw", "error", "says"),
    [
        (hold, BannerError, "nothing behind it spoke"),
        (socket.socket.close, BannerError, "closed before a server answered"),
        (say(b"HTTP/1.0 400 Bad Request\r\n\r\n", then_close=True), BannerError, "broke off the key exchange"),
        (say(b"SSH-2.0-x\r\n", then_close=True), BannerError, "broke off the key exchange"),
        (say(b"SSH-2.0-x\r\n", then_close=False), ConnectTimeoutError, "the key exchange did not finish in time"),
    ],
    ids=["silent", "closed", "not ssh", "gives up", "hangs"],
)
def test_servers_that_are_none(serve: Serve, key: Path, raw: object, error: type[SshError], says: str):
    port = serve(raw=raw)
    began = time.monotonic()
    with pytest.raises(error, match=says) as caught:
        client.connect(target(port, key, "ssh-rsa AAAA"), timeout_s=2, console=lambda: ["last words"])
    assert time.monotonic() - began < 15
    assert caught.value.console == ("last words",)


def test_a_port_that_nobody_listens_on(key: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectRefusedError, match=f"port {port} of 127.0.0.1 refused"):
        client.connect(target(port, key, "ssh-rsa AAAA"), timeout_s=5)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_a_pinned_key_of_any_kind_is_asked_for_and_no_other_taken(
    serve: Serve, key: Path, keys: dict[str, paramiko.PKey], kind: str
):
    port = serve(*keys.values())
    with client.connect(target(port, key, *pin(keys[kind])), timeout_s=LIMIT_S) as connection:
        assert connection.is_connected()
        assert connection.server.startswith("SSH-2.0-")
    others = [one for name, one in keys.items() if name != kind]
    with pytest.raises(HostKeyError, match="is not pinned"):
        client.connect(target(serve(*others), key, *pin(keys[kind])), timeout_s=LIMIT_S)
    with pytest.raises(HostKeyError, match="no host key is recorded"):
        client.connect(target(port, key), timeout_s=LIMIT_S)


def test_logins_that_fail(serve: Serve, key: Path, keys: dict[str, paramiko.PKey]):
    pinned = pin(keys["rsa"])
    port = serve(keys["rsa"])
    with pytest.raises(AuthFailedError, match="does not let nobody in"):
        client.connect(target(port, key, *pinned, user="nobody"), timeout_s=LIMIT_S)
    with pytest.raises(AuthFailedError, match="does not exist"):
        client.connect(target(port, key.parent / "none", *pinned), timeout_s=LIMIT_S)
    (key.parent / "junk").write_text("not a key")
    with pytest.raises(AuthFailedError, match="cannot be used"):
        client.connect(target(port, key.parent / "junk", *pinned), timeout_s=LIMIT_S)
    slow = serve(keys["rsa"], delay_s=10)
    with pytest.raises(ConnectTimeoutError, match="the login as dev did not finish in time"):
        client.connect(target(slow, key, *pinned), timeout_s=2)


def test_commands_that_a_server_does_not_carry_out(serve: Serve, key: Path, keys: dict[str, paramiko.PKey]):
    def connect(on_exec: Callable[[paramiko.Channel, bytes], bool]) -> client.Connection:
        return client.connect(target(serve(keys["rsa"], on_exec=on_exec), key, *pin(keys["rsa"])), timeout_s=LIMIT_S)

    def cut(channel: paramiko.Channel, _: bytes) -> bool:
        channel.get_transport().close()
        return True

    def close(channel: paramiko.Channel, _: bytes) -> bool:
        threading.Timer(0.2, channel.close).start()
        return True

    with connect(lambda *_: False) as connection, pytest.raises(SshError, match="refused to run the command"):
        connection.execute("true", timeout_s=LIMIT_S)
    with connect(close) as connection, pytest.raises(SshError, match="gave no status"):
        connection.execute("true", timeout_s=LIMIT_S)
    with connect(cut) as connection, pytest.raises(ConnectionLostError, match="is not known") as lost:
        connection.execute("true", timeout_s=LIMIT_S)
    assert lost.value.started
    with pytest.raises(ConnectionLostError, match="was not sent") as lost:
        connection.execute("true", timeout_s=LIMIT_S)
    assert not lost.value.started
    with connect(lambda *_: True) as connection:
        began = time.monotonic()
        with pytest.raises(CommandTimeoutError, match="it may still run"):
            connection.execute("true", timeout_s=1)
        assert time.monotonic() - began < LIMIT_S


# ---- what paramiko has no public door for; see vmtasks.guest.transport


def test_the_signal_that_ended_a_command_is_heard_and_other_requests_are_as_ever(
    serve: Serve, key: Path, keys: dict[str, paramiko.PKey]
):
    def end(channel: paramiko.Channel, command: bytes) -> bool:
        def later() -> None:
            message = paramiko.Message()
            message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
            message.add_int(channel.remote_chanid)
            if b"by signal" in command:
                for part in ("exit-signal", False, "TERM", False, "", ""):
                    message.add_boolean(part) if isinstance(part, bool) else message.add_string(part)
            else:
                message.add_string("exit-status")
                message.add_boolean(False)  # noqa: FBT003
                message.add_int(7)
            channel.get_transport()._send_user_message(message)
            channel.close()

        threading.Timer(0.1, later).start()
        return True

    port = serve(keys["rsa"], on_exec=end)
    with transport_to(port, key, *pin(keys["rsa"])) as transport:
        for line, heard in (("by signal", ("TERM", -1)), ("by itself", ("", 7))):
            channel = transport.open_session(timeout=LIMIT_S)
            transport.send_exec(channel, line)
            channel.status_event.wait(LIMIT_S)
            assert (getattr(channel, "exit_signal", ""), channel.exit_status) == heard


def test_a_command_is_sent_without_waiting_for_an_answer(serve: Serve, key: Path, keys: dict[str, paramiko.PKey]):
    asked, answer = threading.Event(), threading.Event()

    def slow(_: paramiko.Channel, command: bytes) -> bool:
        assert command == b"echo 'a b'"
        asked.set()
        return answer.wait(LIMIT_S)

    with transport_to(serve(keys["rsa"], on_exec=slow), key, *pin(keys["rsa"])) as transport:
        transport.send_exec(transport.open_session(timeout=LIMIT_S), "echo 'a b'")
        assert not answer.is_set(), "it returned although the server has not answered"
        assert asked.wait(LIMIT_S)
        answer.set()


@contextmanager
def transport_to(port: int, key: Path, *pinned: str) -> Iterator[Transport]:
    made = login.open_transport(target(port, key, *pinned), time.monotonic() + LIMIT_S)
    try:
        yield made
    finally:
        made.close()


def test_a_connection_closes_while_another_thread_opens_a_channel(
    serve: Serve, key: Path, keys: dict[str, paramiko.PKey], monkeypatch: pytest.MonkeyPatch
):
    """Paramiko lists a channel before the channel knows its transport, and its close() fails on such a one."""
    listed, closed = threading.Event(), threading.Event()
    whole = paramiko.Channel._set_transport

    def slow(channel: paramiko.Channel, transport: paramiko.Transport) -> None:
        if not transport.server_mode:
            listed.set()
            assert closed.wait(LIMIT_S)
        whole(channel, transport)

    connection = client.connect(target(serve(keys["rsa"]), key, *pin(keys["rsa"])), timeout_s=LIMIT_S)
    monkeypatch.setattr(paramiko.Channel, "_set_transport", slow)
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(connection.execute, "true", timeout_s=LIMIT_S)
        assert listed.wait(LIMIT_S)
        try:
            connection.close()
        finally:
            closed.set()
        with pytest.raises(ConnectionLostError):
            command.result(LIMIT_S)


def waiting_shell() -> int:
    """The child of ours that is a shell which waits for a command."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == os.getpid() and b"vmtasks_line" in (folder / "cmdline").read_bytes():
                    return int(folder.name)
            except OSError:
                continue
        time.sleep(0.02)
    raise AssertionError("no shell waits")


def test_a_shell_that_dies_before_it_has_read_its_command_has_run_nothing(tmp_path: Path):
    """The command is run all the same, once, by another shell."""

    def die(pid: int) -> None:
        time.sleep(0.5)  # by then the command lies in its stdin
        os.kill(pid, signal.SIGKILL)

    with serving(tmp_path / "home") as where, client.connect(where, timeout_s=LIMIT_S) as connection:
        for number in range(1, 3):
            connection.execute("true", timeout_s=LIMIT_S)
            shell = waiting_shell()
            os.kill(shell, signal.SIGSTOP)
            threading.Thread(target=die, args=(shell,)).start()
            done = connection.execute("echo once >>ran; exit 7", timeout_s=LIMIT_S)
            assert (done.status, done.signal) == (7, "")
            assert (tmp_path / "home/ran").read_text() == "once\n" * number
        connection.execute("true", timeout_s=LIMIT_S)
        shell = waiting_shell()
        os.kill(shell, signal.SIGSTOP)
        assert connection.execute("cat", stdin=io.BytesIO(b"data"), timeout_s=LIMIT_S).stdout == b"data"
        os.kill(shell, signal.SIGKILL)
        done = connection.execute("kill -KILL $$", timeout_s=LIMIT_S)
        assert (done.status, done.signal) == (137, "KILL"), "one that dies while it runs is a result"
