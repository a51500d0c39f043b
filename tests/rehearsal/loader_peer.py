"""A boot loader as a process of its own at the other end of a serial line: menu, countdown, prompt, and bad lines.

`python loader_peer.py FD JSON`: FD is a connected socket, JSON the vices. When it ends, the last line that it writes to
standard output is what happened, as JSON: the keys that took effect at the menu, the lines carried out at the prompt,
what booted, and with which console.
"""

import json
import random
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import NoReturn

ESCAPE, ENTER, LINE_FEED, KILL = 27, 13, 10, 21
LIVE = b"1234789absvrR\r\n"
"""Keys that do something at DragonFly's menu."""


@dataclass
class Vices:
    """What is wrong with the line. Times in seconds; `lose` and `double` are chances, per character."""

    countdown: int = 4
    double: float = 0.0
    escapes: bool = False
    flush: bool = True
    late: float = 0.0
    lose: float = 0.0
    lose_echo: float = 0.0
    lose_first: int = 0
    lose_key: int = 0
    mute: bool = False
    pieces: bool = False
    power_off: bool = False
    seed: int = 0
    slow: float = 0.0
    tick: float = 0.4


@dataclass
class Happened:
    """What the loader was made to do."""

    menu: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    booted: str = ""
    console: str = "vidconsole"


class Loader:
    """DragonFly's loader as far as a host can tell, on a line with `vices`."""

    def __init__(self, line: socket.socket, vices: Vices) -> None:
        """`line` is the other end of the serial port."""
        self.line, self.vices, self.happened = line, vices, Happened()
        self.chance = random.Random(vices.seed)  # noqa: S311
        self.keys = 0

    def say(self, text: str, *, echo: bool = False) -> None:
        """Write, in the manner of the line."""
        out = ""
        for character in text:
            if echo and self.chance.random() < self.vices.lose_echo:
                continue
            out += character
            if character.isprintable() and self.chance.random() < self.vices.double:
                out += character
        for piece in out if self.vices.pieces else [out]:
            self.line.sendall(piece.encode())
            if self.vices.pieces:
                time.sleep(0.002)

    def key(self, timeout_s: float | None) -> int | None:
        """The next key that is not lost; None when none came in time."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self.line], [], [], left)[0]:
                return None
            got = self.line.recv(1)
            if not got:
                self.end("nobody is there any more")
            self.keys += 1
            time.sleep(self.vices.slow)
            if self.keys <= self.vices.lose_first or self.keys == self.vices.lose_key:
                continue
            if self.chance.random() >= self.vices.lose:
                return got[0]

    def run(self) -> None:
        """Menu and countdown."""
        time.sleep(self.vices.late)
        if self.vices.flush:
            while select.select([self.line], [], [], 0.05)[0] and self.line.recv(64):
                pass
        self.say("\r\n 1. Boot DragonFly [Enter]\r\n 9. Escape to loader prompt (also ESC)\r\n\r\n")
        for left in range(self.vices.countdown, 0, -1):
            bold = "\x1b[1m\x1b[10;5H" if self.vices.escapes else ""
            self.say(f"\r{bold}Booting in {left} seconds... ")
            key = self.key(self.vices.tick)
            if key is None:
                continue
            if key in (ESCAPE, ord("9")):
                self.prompt()
            if key in LIVE:
                self.happened.menu.append(chr(key))
                self.end("menu")
        self.end("countdown")

    def prompt(self) -> NoReturn:
        """The loader's prompt, which edits lines as DragonFly's does."""
        self.say("\r\nType '?' for a list of commands, 'help' for more detailed help.\r\n")
        while True:
            if not self.vices.mute:
                self.say("\x1b[0m\x1b[37mOK " if self.vices.escapes else "OK ")
            line = b""
            while (key := self.key(None)) not in (ENTER, LINE_FEED):
                if key == KILL:
                    line = b""
                    self.say("\n")
                elif key is not None:
                    line += bytes([key])
                    self.say(chr(key), echo=True)
            self.say("\r\n")
            self.carry_out(line.decode(errors="replace"))

    def carry_out(self, line: str) -> None:
        """One line at the prompt."""
        if line:
            self.happened.lines.append(line)
        if line == "boot":
            self.end("boot")
        if line.startswith("set console="):
            self.happened.console = line.removeprefix("set console=")
        elif line:
            self.say("unknown command\r\n")

    def end(self, booted: str) -> NoReturn:
        """The kernel takes over; on the serial line only if that is its console."""
        self.happened.booted = booted
        print(json.dumps(asdict(self.happened)), flush=True)  # noqa: T201
        if booted != "nobody is there any more" and self.happened.console == "comconsole":
            self.line.sendall(b"\r\n::vmtasks:0123456789abcdef:begin\r\n::vmtasks:0123456789abcdef:exit 0 done\r\n")
            sys.exit(0)
        time.sleep(0 if self.vices.power_off else 60)
        sys.exit(1)


if __name__ == "__main__":
    Loader(socket.socket(fileno=int(sys.argv[1])), Vices(**json.loads(sys.argv[2]))).run()
