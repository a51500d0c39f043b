"""`vmtasks` as a user runs it, in a scratch project, and what it leaves behind."""

import hashlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from conftest import Project, free_port, until
from vmtasks.host.locks import lock
from vmtasks.qemu.vm import socket_base

COMMAND = [sys.executable, "-m", "vmtasks.cli"]
RANGE = range(22220, 22230)
Done = subprocess.CompletedProcess[bytes]


class Cli:
    """`vmtasks` in a project."""

    def __init__(self, project: Project) -> None:
        self.project = project
        project.doit("auto_install").good()  # boots nothing: the store has the images, the project not yet their names
        self.run_folder = project.state / "run"

    def env(self) -> dict[str, str]:
        """Without the port of the project's own machine."""
        return {name: value for name, value in self.project.env().items() if name != "VM_SSH_PORT"}

    def start(self, *words: str, **more: object) -> subprocess.Popen[bytes]:
        """A command under way, its output in pipes unless said otherwise."""
        given: dict[str, object] = {
            "start_new_session": True, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
        }  # fmt: skip
        return subprocess.Popen([*COMMAND, *words], cwd=self.project.root, env=self.env(), **{**given, **more})  # type: ignore[call-overload, no-any-return]

    def __call__(self, *words: str, stdin: bytes = b"", timeout_s: float = 240) -> Done:
        """Run a command to its end."""
        return subprocess.run(
            [*COMMAND, *words], cwd=self.project.root, env=self.env(), input=stdin, capture_output=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip

    def good(self, *words: str, stdin: bytes = b"") -> str:
        """The output of a command that must end well."""
        done = self(*words, stdin=stdin)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr.decode())
        return done.stdout.decode()

    def bad(self, *words: str, status: int = 0) -> str:
        """What a command said that must have failed, without a traceback; by default with the status of our own."""
        done = self(*words)
        status = status or (125 if words[0] in ("attach", "exec", "run", "ssh") else 1)
        said = done.stderr.decode()
        assert done.returncode == status, (words, done.returncode, said)
        assert "Traceback" not in said, said
        return said

    def json(self, *words: str) -> object:
        """What a command says in JSON."""
        return json.loads(self.good(*words, "--json"))

    def machine(self, name: str) -> dict[str, object]:
        """A machine as `ps --json` has it."""
        found = [item for item in self.json("ps") if item["name"] == name]  # type: ignore[attr-defined]
        assert len(found) == 1, found
        return dict(found[0])

    def make(self, name: str, *words: str) -> str:
        """`run -d` on a port that nobody else of these tests wants; returns its port."""
        port = str(free_port())
        self.good("run", "-d", "--name", name, "--ssh-port", port, *words)
        return port

    def nothing_left(self) -> None:
        """No process, folder, lock, key or socket of a machine."""
        until(lambda: not self.project.qemus(), 10, "the last QEMU to go")
        left = sorted(path.name for path in self.run_folder.glob("*"))
        assert left == [], left


def sockets() -> set[str]:
    """The folders for sockets that there are now."""
    return {path.name for path in socket_base().iterdir()}


@contextmanager
def range_alone() -> Iterator[None]:
    """Nobody else of these tests uses the ports that vmtasks offers, also in another run of them."""
    with lock(Path(tempfile.gettempdir()) / "vmtasks-tests-ports.lock", "the ports", timeout_s=300):
        yield


@contextmanager
def held(*ports: int) -> Iterator[None]:
    """Listeners on these loopback ports, but where there is one already."""
    with ExitStack() as stack:
        for port in ports:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                listener.bind(("127.0.0.1", port))
                listener.listen()
        yield


def make_key(path: Path, kind: str = "ed25519") -> Path:
    """A key pair of somebody's own; returns the public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", path.name, "-f", path], check=True)
    return path.with_name(path.name + ".pub")


def login(cli: Cli, name: str, key: Path, *words: str, user: str = "dev") -> Done:
    """Log in with this key and no other, host key checked, on a connection of its own."""
    folder = Path(str(cli.machine(name)["ssh_config"])).resolve().parent
    options = {
        "BatchMode": "yes", "ControlPath": "none", "GlobalKnownHostsFile": "/dev/null", "HostKeyAlias": name,
        "IdentitiesOnly": "yes", "IdentityAgent": "none", "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": f"{folder}/known_hosts",
    }  # fmt: skip
    port = str(cli.machine(name)["ports"][0]["host"])  # type: ignore[index]
    given = [word for item in options.items() for word in ("-o", "=".join(item))]
    return subprocess.run(
        ["ssh", "-F", "/dev/null", *given, "-i", key, "-p", port, f"{user}@127.0.0.1", *words],
        capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes], number: signal.Signals, timeout_s: float = 60) -> int:
    """Send a signal; returns the status."""
    os.kill(process.pid, number)
    return process.wait(timeout_s)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def get(port: int) -> str:
    """What a web server on a loopback port says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


def open_port(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def here() -> Iterator[int]:
    """A web server of this host, on loopback; gives its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from the host\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@contextmanager
def socks(proxy: int, host: str, port: int) -> Iterator[socket.socket]:
    """A connection through a SOCKS 5 proxy that looks the name up itself; see RFC 1928."""
    with socket.create_connection(("127.0.0.1", proxy), 30) as connection:
        connection.sendall(b"\5\1\0")
        assert connection.recv(2) == b"\5\0"
        name = host.encode()
        connection.sendall(b"\5\1\0\3" + bytes([len(name)]) + name + port.to_bytes(2, "big"))
        assert connection.recv(10)[:2] == b"\5\0"
        yield connection
