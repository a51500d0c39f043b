"""A machine as a test uses it: each method is a few lines on session and remote, and leaves an entry in the journal."""

import contextlib
import os
import posixpath
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vmtasks import printable
from vmtasks.errors import CommandTimeoutError, ConnectionLostError, MachineError, SshError
from vmtasks.guest import boot, files, listeners, ssh
from vmtasks.guest.command import Command, Executed
from vmtasks.host import process
from vmtasks.host.progress import seconds
from vmtasks.machines import Machine, Project, Wants, ephemeral
from vmtasks.qemu.console import read_log
from vmtasks.qemu.ports import port_free
from vmtasks.qemu.vm import wait_until

T = TypeVar("T")

COMMAND_S = 60.0
POLL_S = 0.3
SHOWN_CHARS = 200


@contextlib.contextmanager
def opened(root: Path, image: str, *, keep: bool, **wants: Any) -> Iterator["Vm"]:
    """A running machine of the project that `root` is in, for the length of the block. VmTasksError when it fails."""
    with contextlib.ExitStack() as stack:
        asked = Wants(image=image, throwaway=not keep, **wants)
        machine = stack.enter_context(ephemeral(Project.find(root), asked, keep=keep, note=lambda _: None))
        vm = Vm(machine)
        stack.callback(vm.close)
        yield vm


class Vm:
    """A machine under test. Times are in seconds and meant for this host: nothing is scaled."""

    def __init__(self, machine: Machine) -> None:
        """`machine` runs."""
        self.machine = machine
        self.journal: list[str] = []
        self._began = time.monotonic()
        self._open = contextlib.ExitStack()
        self._link = self.machine.link()

    @property
    def name(self) -> str:
        """Name of the machine."""
        return self.machine.name

    @property
    def line(self) -> str:
        """The command line that logs in."""
        return self.machine.ssh_line()

    def close(self) -> None:
        """End forwards and the connection; the machine is left as it is."""
        self._open.close()
        self._link.close()

    # -- commands

    def execute(
        self,
        command: Command,
        *,
        timeout_s: float = COMMAND_S,
        user: str = "",
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Executed:
        """Run a script (str) or a program with arguments (list): `.status`, `.stdout` and `.stderr` in bytes.

        CommandTimeoutError after `timeout_s`: what it has started was ended. ConnectionLostError, RebootedError.
        """
        shown = command if isinstance(command, str) else process.quote(list(command))
        with self._noted(f"$ {shown[:SHOWN_CHARS]}") as note:
            done = self._link.execute(command, timeout_s=timeout_s, user=user, cwd=cwd, env=env, stdin=stdin)
            note(f"status {done.status}")
        return done

    def succeed(self, command: Command, **more: Any) -> str:
        """What a command prints that must exit with 0. AssertionError with both of its streams when it does not."""
        done = self.execute(command, **more)
        if done.status != 0:
            raise AssertionError(_account(command, done, "0"))
        return done.stdout.decode(errors="replace")

    def fail(self, command: Command, **more: Any) -> str:
        """What a command prints that must not exit with 0."""
        done = self.execute(command, **more)
        if done.status == 0:
            raise AssertionError(_account(command, done, "other than 0"))
        return done.stdout.decode(errors="replace")

    def wait_until_succeeds(self, command: Command, *, timeout_s: float = COMMAND_S, **more: Any) -> str:
        """Run a command again and again until it exits with 0. AssertionError with the last try after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                done = self.execute(command, timeout_s=max(1.0, until - time.monotonic()), **more)
            except CommandTimeoutError as error:
                raise AssertionError(f"{command!r} did not succeed within {timeout_s:g} s: {error}") from None
            if done.status == 0:
                return done.stdout.decode(errors="replace")
            if time.monotonic() > until:
                raise AssertionError(f"within {timeout_s:g} s: {_account(command, done, '0')}")
            time.sleep(POLL_S)

    def wait_for_port(self, port: int, *, host: str = "127.0.0.1", timeout_s: float = COMMAND_S) -> None:
        """Wait until something in the guest listens on a TCP port of its address `host`; it is not called.

        AssertionError with the ports that something listens on after `timeout_s`.
        """
        with self._noted(f"wait for port {port} of {host}"):
            until = time.monotonic() + timeout_s
            while True:
                left = max(1.0, until - time.monotonic())
                # Not by a call: what listens may take only one.
                table = self._link.execute(listeners.SCRIPT, timeout_s=min(COMMAND_S, left)).stdout
                found = listeners.parse(table.decode(errors="replace"))
                if any(one.serves(host, port) for one in found):
                    return
                if time.monotonic() > until:
                    others = ", ".join(map(str, found)) or "no port"
                    what = f"nothing listened on port {port} of {host} within {timeout_s:g} s"
                    raise AssertionError(f"{what}; something listens on {others}")
                time.sleep(POLL_S)

    # -- files and ports

    def put(self, source: str | os.PathLike[str], dest: str) -> None:
        """Copy a file into the guest, whole or not at all, or a folder; `dest` is relative to the login user's home.

        Folders above it that are not there are made.
        """
        with self._noted(f"put {os.fspath(source)} {dest}"):
            target = self.machine.running()
            if Path(source).is_dir():
                folder = posixpath.dirname(dest.rstrip("/")) or "."
                self._link.execute(["mkdir", "-p", "--", folder], timeout_s=COMMAND_S)
                self._copy(str(Path(source).absolute()), f"{target.name}:{dest}")
            else:
                files.put(target, Path(source), dest)

    def get(self, source: str, dest: str | os.PathLike[str]) -> None:
        """Copy a file out of the guest, whole or not at all. Folders above `dest` that are not there are made."""
        with self._noted(f"get {source} {os.fspath(dest)}"):
            Path(dest).parent.mkdir(parents=True, exist_ok=True)
            files.get(self.machine.running(), source, Path(dest))

    def forward(self, port: int, *, host: str = "127.0.0.1", timeout_s: float = 30.0) -> int:
        """A loopback port of this host that leads to a TCP port in the guest, until the machine is gone."""
        target = self.machine.running()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ours = int(probe.getsockname()[1])
        options = ["-N", "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"]
        with self._noted(f"forward {ours} to port {port} of {host}"):
            words = target.argv(options=[*options, "-L", f"127.0.0.1:{ours}:{host}:{port}"])
            child = self._open.enter_context(process.spawn(words, die_with_us=True))
            # Not by a call: what listens in the guest may take only one.
            wait_until(lambda: child.poll() is not None or not port_free(ours), timeout_s)
            if child.poll() is not None or port_free(ours):
                raise SshError(f"port {ours} could not be forwarded to port {port} of {host} in {self.name}")
        return ours

    # -- life

    def start(self) -> None:
        """Start a machine that is stopped or has crashed, and wait until it lets us in."""
        with self._noted("start"):
            self.machine.start(lambda _: None)
            self._link = self.machine.link()

    def stop(self) -> str:
        """Stop it, gently first; returns the rung of the ladder that was needed."""
        with self._noted("stop") as note:
            self.close()
            rung = self.machine.stop(lambda _: None)
            note(rung)
            return rung

    def crash(self) -> None:
        """Cut its power. It stays off until start()."""
        with self._noted("crash"):
            self.close()
            self.machine.stop(lambda _: None, gentle=False)

    def reboot(self, *, timeout_s: float = 300.0) -> None:
        """Have the guest reboot, and wait until it lets us in again."""
        with self._noted("reboot"):
            before = self._link.boot()
            with contextlib.suppress(ConnectionLostError, CommandTimeoutError):
                self._link.open().execute("reboot", timeout_s=10.0, user="root")
            until = time.monotonic() + timeout_s
            while True:
                self._link.close()
                with contextlib.suppress(SshError):
                    self._link.open(wait_s=max(1.0, until - time.monotonic()))
                    if boot.compare(before, self._link.boot()) == "rebooted":
                        ssh.close(self.machine.running())
                        return
                if time.monotonic() > until:
                    raise MachineError(
                        f"{self.name} did not reboot within {seconds(timeout_s)}", console=self.console()
                    )
                time.sleep(POLL_S)

    def snapshot(self, tag: str) -> None:
        """Keep this moment, RAM and disk, under a name; the machine runs on."""
        with self._noted(f"snapshot {tag}"):
            self.machine.keep_moment(tag)

    def restore(self, tag: str) -> None:
        """Go back to a moment that snapshot() has kept: in a second or so, with all that ran then running again."""
        with self._noted(f"restore {tag}"):
            self.close()
            self.machine.back_to_moment(tag)
            self._link = self.machine.link()
            self._link.open(wait_s=COMMAND_S)

    # -- looking

    def console(self, lines: int = 30) -> list[str]:
        """The last lines of the serial console."""
        return read_log(self.machine.console_log).tail(lines)

    # -- parts

    def _copy(self, source: str, dest: str) -> None:
        config = self.machine.running().config
        process.run(["scp", "-F", str(config), "-q", "-r", "-p", "--", source, dest], timeout_s=600)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[Callable[[str], None]]:
        """An entry in the journal: when it began, what it was, how long it took, how it ended."""
        began, ends = time.monotonic(), ["done"]
        try:
            yield ends.append
        except BaseException as error:
            ends.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            raise
        finally:
            took = time.monotonic() - began
            self.journal.append(
                f"{began - self._began:8.1f} s  {printable.line(f'{what}: {ends[-1]}')} after {took:.1f} s"
            )


def _account(command: Command, done: Executed, wanted: str) -> str:
    shown = command if isinstance(command, str) else process.quote(list(command))
    streams = [
        f"{name}:\n{text.decode(errors='replace').rstrip()}"
        for name, text in (("stdout", done.stdout), ("stderr", done.stderr))
        if text.strip()
    ]
    return printable.text("\n".join([f"{shown}\nexited with {done.status}, not with a status {wanted}", *streams]))
