"""A machine by name: life cycle, commands and files in its guest, RAM checkpoints, disk snapshots.

The object holds no essential state: the machine's state is in its folder, which other processes use too. Thread-safe;
several objects may share one machine.
"""

import contextlib
import os
import posixpath
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vmtasks import printable
from vmtasks.config.load import Config
from vmtasks.errors import CommandTimeoutError, SshError, WrongStatusError
from vmtasks.guest import files, listeners, ssh
from vmtasks.guest.command import Command, CommandResult, command_text, wrong_status
from vmtasks.guest.link import Link
from vmtasks.host import process
from vmtasks.images.workspace import CLEAN
from vmtasks.machines import life, login, overlay, start, state
from vmtasks.machines.folder import Place
from vmtasks.machines.jobs import Jobs
from vmtasks.machines.state import MachineState
from vmtasks.qemu import checkpoint
from vmtasks.qemu.console import read_log
from vmtasks.qemu.events import Events
from vmtasks.qemu.ports import port_free
from vmtasks.qemu.vm import wait_until
from vmtasks.store.records import ImageRecord

if TYPE_CHECKING:
    from vmtasks.guest.terminal import Terminal

COMMAND_S = 60.0
COPY_S = 600.0
JOURNAL = 1000
POLL_S = 0.3
SHOWN_CHARS = 200
WINDOW_S = 180.0


class Machine:
    """One machine of a project, whether or not it exists. Times are in seconds on this host and are not scaled.

    Raises StateError if the machine is in the wrong state, MachineError for QEMU, SshError for the guest.
    """

    def __init__(self, config: Config, name: str = "") -> None:
        """`name` defaults to the configured one. Touches nothing yet."""
        self.place = Place(config, name)
        self.jobs = Jobs(self._shared_link)
        self._journal: deque[str] = deque(maxlen=JOURNAL)
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._open = contextlib.ExitStack()
        self._link: Link | None = None
        self._linked_process: tuple[int, str] = (0, "")

    def __enter__(self) -> Self:
        """Close connections and forwards at the end of the block; the machine is not changed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self.close()

    def __repr__(self) -> str:
        """`Machine(dev in /home/me/project/.vm/run/dev)`."""
        return f"Machine({self.name} in {self.folder})"

    @property
    def name(self) -> str:
        """Its name."""
        return self.place.name

    @property
    def config(self) -> Config:
        """The configuration that it is made from."""
        return self.place.config

    @property
    def folder(self) -> Path:
        """The folder for its record, disk and logs; it may not exist."""
        return self.place.folder

    @property
    def journal(self) -> list[str]:
        """The last 1000 actions through this object: when, what, how long it took, how it ended."""
        return list(self._journal)

    def close(self) -> None:
        """Close forwards and the connection. Does not change the machine; the object can be used again."""
        with self._lock:
            self._open.close()
            if self._link is not None:
                self._link.close()
            self._link = None

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
    ) -> CommandResult:
        """Run a script (str) or a program with arguments (list): `.status`, `.stdout` and `.stderr` in bytes.

        CommandTimeoutError after `timeout_s`: its processes were ended. ConnectionLostError, RebootedError.
        """
        with self._journaled(f"$ {command_text(command)[:SHOWN_CHARS]}") as note:
            link = self._shared_link()
            done = link.execute(command, timeout_s=timeout_s, user=user, cwd=cwd, env=env, stdin=stdin)
            note(f"status {done.status}")
        return done

    def succeed(self, command: Command, **more: Any) -> str:
        """Run a command that must exit with 0; returns its stdout. WrongStatusError, with both streams, otherwise."""
        done = self.execute(command, **more)
        if done.status != 0:
            raise wrong_status(command, done, "0")
        return done.stdout.decode(errors="replace")

    def fail(self, command: Command, **more: Any) -> str:
        """Run a command that must not exit with 0; returns its stdout. WrongStatusError otherwise."""
        done = self.execute(command, **more)
        if done.status == 0:
            raise wrong_status(command, done, "other than 0")
        return done.stdout.decode(errors="replace")

    def wait_until_succeeds(self, command: Command, *, timeout_s: float = COMMAND_S, **more: Any) -> str:
        """Repeat a command until it exits with 0. WrongStatusError, with the last attempt, after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                done = self.execute(command, timeout_s=max(1.0, until - time.monotonic()), **more)
            except CommandTimeoutError as error:
                raise WrongStatusError(f"{command!r} did not succeed within {timeout_s:g} s: {error}") from None
            if done.status == 0:
                return done.stdout.decode(errors="replace")
            if time.monotonic() > until:
                raise wrong_status(command, done, "0", f"within {timeout_s:g} s: ")
            time.sleep(POLL_S)

    def wait_for_port(self, port: int, *, host: str = "127.0.0.1", timeout_s: float = COMMAND_S) -> None:
        """Wait until the guest listens on a TCP port of its address `host`. Makes no connection.

        WrongStatusError, with the open ports, after `timeout_s`.
        """
        with self._journaled(f"wait for port {port} of {host}"):
            until = time.monotonic() + timeout_s
            while True:
                left = max(1.0, until - time.monotonic())
                # Without a connection: the server may accept only one.
                table = self._shared_link().execute(listeners.SCRIPT, timeout_s=min(COMMAND_S, left)).stdout
                found = listeners.parse(table.decode(errors="replace"))
                if any(one.serves(host, port) for one in found):
                    return
                if time.monotonic() > until:
                    others = ", ".join(map(str, found)) or "no port"
                    what = f"nothing listened on port {port} of {host} within {timeout_s:g} s"
                    raise WrongStatusError(f"{what}; something listens on {others}")
                time.sleep(POLL_S)

    def shell(
        self,
        command: str = "",
        *,
        verb: str = "ssh",
        user: str = "",
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        tty: bool = False,
        stdin: bool = True,
        timeout_s: float | None = None,
        options: Sequence[str] = (),
        failed: int = ssh.FAILED,
        shown: str = "",
    ) -> int:
        """Log in on our own terminal and streams, or run a shell command there; returns its status. See login.log_in().

        OpenSSH forwards the size of our terminal and its changes.
        """
        with self._journaled(shown or command or "log in") as note:
            status = login.log_in(
                self.place, verb, command, user=user, cwd=cwd, env=env, tty=tty, stdin=stdin, timeout_s=timeout_s,
                options=options, failed=failed, shown=shown,
            )  # fmt: skip
            note(f"status {status}")
        return status

    def terminal(self, command: Command = "", **more: Any) -> "Terminal":
        """Run a command, by default a login shell, on a terminal that Python types on, reads and resizes.

        `more`: columns, rows, cwd, env, user, timeout_s. See Connection.open_terminal().
        """
        with self._journaled(f"terminal {command_text(command)}".rstrip()):
            return self._shared_link().open().open_terminal(command, **more)

    # -- files and ports

    def put(self, source: str | os.PathLike[str], dest: str) -> None:
        """Copy a file, atomically, or a folder into the guest; `dest` is relative to the login user's home.

        Creates missing parent folders.
        """
        with self._journaled(f"put {os.fspath(source)} {dest}"):
            target = life.wait_ready(self.place)
            if Path(source).is_dir():
                folder = posixpath.dirname(dest.rstrip("/")) or "."
                self._shared_link().execute(["mkdir", "-p", "--", folder], timeout_s=COMMAND_S)
                process.run(target.scp(str(Path(source).absolute()), f"{target.name}:{dest}"), timeout_s=COPY_S)
            else:
                files.put(target, Path(source), dest)

    def get(self, source: str, dest: str | os.PathLike[str]) -> None:
        """Copy a file out of the guest, atomically. Creates missing parent folders of `dest`."""
        with self._journaled(f"get {source} {os.fspath(dest)}"):
            Path(dest).parent.mkdir(parents=True, exist_ok=True)
            files.get(life.wait_ready(self.place), source, Path(dest))

    def forward(self, port: int, *, host: str = "127.0.0.1", timeout_s: float = 30.0) -> int:
        """Forward a loopback port of this host to a TCP port in the guest until close() or its stop; returns it."""
        target = life.wait_ready(self.place)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local_port = int(probe.getsockname()[1])
        options = ["-N", "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"]
        with self._journaled(f"forward {local_port} to port {port} of {host}"):
            words = target.argv(options=[*options, "-L", f"127.0.0.1:{local_port}:{host}:{port}"])
            with self._lock:
                # The kernel would end it with the thread, not with the process.
                main = threading.current_thread() is threading.main_thread()
                child = self._open.enter_context(process.spawn(words, die_with_us=main))
            # Without a connection: the server in the guest may accept only one.
            wait_until(lambda: child.poll() is not None or not port_free(local_port), timeout_s)
            if child.poll() is not None or port_free(local_port):
                raise SshError(f"port {local_port} could not be forwarded to port {port} of {host} in {self.name}")
        return local_port

    # -- life

    def start(self, *, die_with_us: bool = False) -> None:
        """Start it, and wait for SSH. Creates it from its image if it does not exist.

        `die_with_us`: the kernel ends its QEMU with the calling thread.
        """
        with self._journaled("start"):
            life.start_up(self.place, die_with_us=die_with_us)

    def stop(self, *, gentle: bool = True, timeout_s: float | None = None) -> str:
        """Stop it, gently first; returns the rung of the ladder that was needed. See life.stop()."""
        with self._journaled("stop") as note:
            self.close()
            rung = life.stop(self.place, gentle=gentle, timeout_s=timeout_s)
            note(rung)
            return rung

    def crash(self) -> None:
        """Cut its power. It stays off until start()."""
        with self._journaled("crash"):
            self.close()
            life.stop(self.place, gentle=False)

    def reboot(self, *, timeout_s: float = 300.0) -> None:
        """Reboot the guest, and wait for SSH. MachineError after `timeout_s`."""
        with self._journaled("reboot"):
            self._shared_link().reboot(timeout_s=timeout_s)

    def renew(self, lease_s: float) -> None:
        """Set its lease to end `lease_s` from now; the next command after that removes it. 0: no lease."""
        life.renew(self.place, lease_s)

    def remove(self, *, force: bool = False) -> list[Path]:
        """Cut its power and remove it with its disk and key; returns what was removed. See life.destroy()."""
        with self._journaled("remove"):
            self.close()
            return life.destroy(self.place, force=force, report=False)

    # -- RAM checkpoints, disk snapshots

    def checkpoint(self, tag: str) -> None:
        """Save RAM, devices and disk under a name, inside its disk; the machine keeps running."""
        with self._journaled(f"checkpoint {tag}"):
            life.require_running(self.place)
            checkpoint.save(self.place.qmp, tag)

    def rollback(self, tag: str) -> None:
        """Go back to a checkpoint() within a second or so: all processes of that moment run again.

        Closes our connection and those that OpenSSH shares: they are not part of the checkpoint.
        """
        with self._journaled(f"rollback {tag}"):
            target = life.require_running(self.place)
            self.close()
            checkpoint.load(self.place.qmp, tag)
            ssh.close(target)
            self._shared_link().open(wait_s=COMMAND_S)

    def snapshot(self, name: str) -> ImageRecord:
        """Save the disk of the stopped machine as a snapshot, from which other machines can be created."""
        with self._journaled(f"snapshot {name}"):
            return life.snapshot(self.place, name)

    def restore(self, snapshot: str = "") -> ImageRecord:
        """Discard its writes and go back to a snapshot, by default the one it was made from. Stops it."""
        with self._journaled(f"restore {snapshot}".rstrip()):
            self.close()
            return life.restore(self.place, snapshot)

    def image(self) -> ImageRecord:
        """The image of its snapshot, by default `clean`."""
        record = self.place.record()
        return overlay.find_image(self.place, record.snapshot if record else CLEAN)

    def snapshots(self) -> list[str]:
        """Names of its guest's snapshots."""
        return overlay.names(self.place)

    # -- queries

    def status(self) -> MachineState:
        """Its state now; takes no lock. Needs no login after the first."""
        return state.read_state(self.place)

    def console(self, lines: int = 30) -> list[str]:
        """The last lines of its serial console."""
        return read_log(self.place.console_log).tail(lines)

    def ssh_line(self) -> str:
        """The command line that logs in, ready for a shell."""
        return self.place.ssh_line()

    def require_running(self) -> ssh.Target:
        """How SSH reaches it. StateError if it does not run."""
        return life.require_running(self.place)

    def link(self, window_s: float = WINDOW_S) -> Link:
        """A separate resilient link to the running machine; see vmtasks.guest.link.

        `window_s`: how long the guest may take to come back. StateError if the machine does not run.
        """
        record = self.place.record()
        target = life.require_running(self.place)
        log = self.place.console_log
        now = log.stat().st_size if log.exists() else 0
        return Link(
            target,
            window_s=window_s,
            console=lambda: read_log(log).tail(),
            alive=start.BootWatch(self.place, record, now, patient=True) if record is not None else lambda: False,
            events=Events(self.place.events).boot_marker,
        )

    # -- parts

    def _shared_link(self) -> Link:
        """The link that all threads share; a new one if the machine was restarted, by any process."""
        with self._lock:
            record = self.place.record()
            now = (record.pid, record.pid_started) if record is not None else (0, "")
            if self._link is None or self._linked_process != now:
                life.wait_ready(self.place)
                if self._link is not None:
                    self._link.close()
                self._link, self._linked_process = self.link(), now
            return self._link

    @contextlib.contextmanager
    def _journaled(self, what: str) -> Iterator[Callable[[str], None]]:
        """Write a journal entry for the block: when it began, what it was, how long it took, how it ended."""
        began, ends = time.monotonic(), ["done"]
        try:
            yield ends.append
        except BaseException as error:
            ends.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            raise
        finally:
            took = time.monotonic() - began
            entry = printable.line(f"{what}: {ends[-1]}")
            self._journal.append(f"{began - self._began:8.1f} s  {entry} after {took:.1f} s")
