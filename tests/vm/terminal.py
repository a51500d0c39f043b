"""A real terminal with a program in it: what a person sees and types."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from conftest import Ended, Project

KEY_S = 0.002
"""Pause between typed characters."""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self._master = process, master
        self.seen, self._from, self._began = "", 0, time.monotonic()

    def read(self, timeout_s: float) -> bool:
        """Take in what comes; False when nothing did in time, or nothing can any more."""
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody holds the other side
            return False
        self.seen += data.decode(errors="replace").replace("\r", "")
        return bool(data)

    def wait_for(self, expression: str, timeout_s: float = 90) -> str:
        """Wait for text that has not been waited for yet."""
        deadline = time.monotonic() + timeout_s
        while (found := re.compile(expression).search(self.seen, self._from)) is None:
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {expression!r}; seen:\n{self.seen[-3000:]}"
            came = self.read(0.2)
            assert came or self.process.poll() is None, f"it ended; wanted {expression!r}; seen:\n{self.seen[-3000:]}"
        self._from = found.end()
        return found[0]

    def type(self, text: str) -> None:
        for character in text:
            os.write(self._master, character.encode())
            self.read(0)
            time.sleep(KEY_S)

    def run(self, command: str, timeout_s: float = 90) -> None:
        """Have the shell in the guest run a command, which must succeed."""
        self.type(f"{command} && echo do''ne $?\r")
        self.wait_for("done 0", timeout_s)

    def log_in(self) -> None:
        """As root at the guest's console, where that needs no password."""
        self.wait_for("login: $")
        self.type("root\r")
        self.wait_for("# $")

    def loader(self) -> None:
        """Make the installer's loader use the serial console."""
        self.wait_for(r"Booting in \d+ seconds")
        self.type("9")
        for line in ("set console=comconsole", "boot"):
            self.wait_for("OK $")
            self.type(f"{line}\r")

    def end(self, timeout_s: float = 60) -> Ended:
        """Wait for its end."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end; seen:\n{self.seen[-3000:]}"
            self.read(0.2)
        while self.read(0):
            pass
        return Ended(self.process.returncode, self.seen, time.monotonic() - self._began)


@contextmanager
def terminal(argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a program on a terminal for the length of the block; Ctrl-C there reaches all that it starts."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - a system call only
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(master)


@contextmanager
def on_terminal(project: Project, *words: str, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    """Run `doit WORDS...` on a terminal for the length of the block."""
    given = {**project.env(), "TERM": "dumb", **(env or {})}
    with terminal([sys.executable, "-m", "doit", *words], project.root, given) as made:
        yield made
