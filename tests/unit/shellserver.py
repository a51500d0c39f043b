"""An SSH server on loopback that carries out what it is told, with this host's shell, in a home of the test's."""

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from vmtasks.guest.ssh import Target


class _Login(paramiko.ServerInterface):
    """Lets anybody in who has a key."""

    def __init__(self, home: Path, cuts: list[str]) -> None:
        self._home = home
        self._cuts = cuts
        self._terminals: dict[int, tuple[int, int]] = {}

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:  # noqa: ARG002
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        if self._cuts:
            self._cuts.pop()
            channel.get_transport().close()
            return True
        if channel.get_id() in self._terminals:
            self._run_on_terminal(channel, command, self._terminals[channel.get_id()])
            return True
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd=self._home,
            env={"HOME": str(self._home), "PATH": os.environ["PATH"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=_feed, args=(channel, child), daemon=True).start()
        threading.Thread(target=_tell, args=(channel, child), daemon=True).start()
        return True

    def check_channel_pty_request(
        self,
        channel: paramiko.Channel,
        term: bytes,  # noqa: ARG002
        width: int,
        height: int,
        pixelwidth: int,  # noqa: ARG002
        pixelheight: int,  # noqa: ARG002
        modes: bytes,  # noqa: ARG002
    ) -> bool:
        self._terminals[channel.get_id()] = pty.openpty()
        return self.check_channel_window_change_request(channel, width, height, 0, 0)

    def check_channel_window_change_request(
        self,
        channel: paramiko.Channel,
        width: int,
        height: int,
        pixelwidth: int,  # noqa: ARG002
        pixelheight: int,  # noqa: ARG002
    ) -> bool:
        termios.tcsetwinsize(self._terminals[channel.get_id()][0], (height, width))
        return True

    def _run_on_terminal(self, channel: paramiko.Channel, command: bytes, ends: tuple[int, int]) -> None:
        """As sshd does it: closing the channel closes our end, which hangs up the programs on the other."""
        ours, theirs = ends
        child = subprocess.Popen(
            ["setsid", "-c", "/bin/sh", "-c", command],
            cwd=self._home, env={"HOME": str(self._home), "PATH": os.environ["PATH"]},
            stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)

        hung_up = threading.Event()

        def show() -> None:
            with contextlib.suppress(OSError):  # EIO: the last program on the terminal has ended
                # close() would not hang up while another thread reads
                while not hung_up.is_set():
                    if select.select([ours], [], [], 0.05)[0]:
                        channel.sendall(os.read(ours, 65536))
            os.close(ours)
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # the other end has gone
                if (status := child.wait()) >= 0:
                    channel.send_exit_status(status)
                channel.close()

        def type_in() -> None:
            with contextlib.suppress(OSError):
                while data := channel.recv(65536):
                    os.write(ours, data)
            hung_up.set()

        for work in (show, type_in):
            threading.Thread(target=work, daemon=True).start()


def _feed(channel: paramiko.Channel, child: "subprocess.Popen[bytes]") -> None:
    """What the client sends is the command's stdin."""
    assert child.stdin
    try:
        while data := channel.recv(65536):
            child.stdin.write(data)
            child.stdin.flush()
        child.stdin.close()
    except OSError:
        pass


def _tell(channel: paramiko.Channel, child: "subprocess.Popen[bytes]") -> None:
    """Both streams, then how the command ended, as OpenSSH's server tells it."""

    def pass_on(source: Any, sink: Any) -> None:
        try:
            while data := os.read(source.fileno(), 65536):
                sink(data)
        except (OSError, EOFError):  # the other end has gone
            pass

    errors = threading.Thread(target=pass_on, args=(child.stderr, channel.sendall_stderr), daemon=True)
    errors.start()
    pass_on(child.stdout, channel.sendall)
    errors.join()
    try:
        try:
            # The status goes first: a client that has said its EOF closes the channel at ours, and would miss it.
            status = child.wait(0.2)
        except subprocess.TimeoutExpired:
            channel.shutdown_write()
            status = child.wait()
        if status >= 0:
            channel.send_exit_status(status)
        else:
            message = paramiko.Message()
            message.add_byte(cMSG_CHANNEL_REQUEST)
            message.add_int(channel.remote_chanid)
            message.add_string("exit-signal")
            message.add_boolean(False)  # noqa: FBT003 - no answer is wanted
            message.add_string(signal.Signals(-status).name.removeprefix("SIG"))
            message.add_boolean(False)  # noqa: FBT003 - no core was dumped
            message.add_string("")
            message.add_string("")
            channel.get_transport()._send_user_message(message)
        channel.close()
    except (OSError, EOFError, paramiko.SSHException):
        child.wait()


@contextmanager
def serving(home: Path, *, refuse: int = 0, cut: int = 0) -> Iterator[Target]:
    """A machine, as its SSH client sees it, whose commands run here below `home`.

    The first `refuse` connections are closed at once; later ones `cut` times as soon as a command comes.
    """
    key = paramiko.ECDSAKey.generate()
    home.mkdir(exist_ok=True)
    key.write_private_key_file(str(home.parent / "key"))
    listener = socket.create_server(("127.0.0.1", 0))
    transports: list[paramiko.Transport] = []
    refused, cuts = ["refuse"] * refuse, ["cut"] * cut

    def loop() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            if refused:
                refused.pop()
                peer.close()
                continue
            transport = paramiko.Transport(peer)
            transport.set_log_channel("quiet")
            transport.add_server_key(key)
            transport.start_server(event=threading.Event(), server=_Login(home, cuts))
            transports.append(transport)

    threading.Thread(target=loop, daemon=True).start()
    pinned = f"{key.get_name()} {key.get_base64()}"
    try:
        port = int(listener.getsockname()[1])
        yield Target("vm", port, "dev", home.parent / "key", (pinned,), home.parent)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for transport in transports:
            transport.close()
