"""PURE: the command line that runs one command in a guest in its own process group, and the parsers of its output.

The guest's shell first prints a header on stderr: its process group, with a token that only this command knows. The
caller strips that line, and can kill the group at a deadline.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vmtasks import printable
from vmtasks.errors import ConfigError, WrongStatusError
from vmtasks.guest import ssh

GROUP_FIRST = "kill -0 -$$ 2>/dev/null || ! command -v setsid >/dev/null 2>&1 || "
"""OpenSSH's server makes a group for each command, dropbear does not. Not every system has setsid. Where a shell does
not lead its group, setsid does not fork, so the status stays that of the command."""

NO_INPUT = "exec </dev/null; "
READ = "IFS= read -r vmtasks_line || exit 0; "
RUN = (
    'case $vmtasks_line in =*) eval "unset vmtasks_line;${vmtasks_line#=}" ;; '
    '*) eval "unset vmtasks_line;$(printf %b "$vmtasks_line")" ;; esac'
)
"""Runs the line that READ has read. A shell reads no byte beyond it: the rest is the command's. printf costs a fork."""

Command = str | Sequence[str]
"""A script for sh, or a program with its arguments, passed verbatim."""

Stream = Literal["stdout", "stderr"]
Via = Literal["", "sh", "setsid"]
"""How a command becomes a group leader: not known yet, by itself, or through setsid."""

OnLine = Callable[[str, Stream], None]
OnData = Callable[[bytes, Stream], None]


@dataclass(frozen=True)
class CommandResult:
    """A command that has ended. `status` is 128 + N after signal N; `signal` is its name, such as KILL, or empty."""

    stdout: bytes
    stderr: bytes
    status: int
    signal: str = ""


def wrong_status(command: Command, done: CommandResult, wanted: str, when: str = "") -> WrongStatusError:
    """The error for a status that is not `wanted`, with the command and its output. `when` begins the sentence."""
    streams = [
        f"{name}:\n{text.decode(errors='replace').rstrip()}"
        for name, text in (("stdout", done.stdout), ("stderr", done.stderr))
        if text.strip()
    ]
    said = [f"{when}{command_text(command)}\nexited with {done.status}, not with a status {wanted}", *streams]
    return WrongStatusError(printable.text("\n".join(said)), result=done)


def command_text(command: Command) -> str:
    """A command as a person reads it."""
    return command if isinstance(command, str) else shlex.join(command)


@dataclass(frozen=True)
class Wire:
    """A command as it is sent: the command line, the bytes to write to stdin first, and the token.

    `header_lines`: how many header lines to expect. Nothing of the command runs before the last of them.
    """

    line: str
    preamble: bytes
    token: str
    header_lines: int = 1


def script(command: Command, *, cwd: str = "", env: Mapping[str, str] | None = None, user: str = "") -> str:
    """The script that runs `command`. ConfigError for NUL, an invalid variable name or an empty argv."""
    if isinstance(command, str):
        text = command
    else:
        if not command:
            raise ConfigError("a command needs at least one word")
        # `exec` reads a leading dash as an option of its own.
        text = ("" if command[0].startswith("-") else "exec ") + shlex.join(command)
    names = [name for name in env or {} if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
    if names:
        raise ConfigError(f"{names[0]!r} cannot be the name of an environment variable")
    if any("\0" in part for part in (text, cwd, user, *(env or {}).values())):
        raise ConfigError("a command, its folder and its environment cannot hold the character NUL")
    if cwd or env or user:
        return ssh.script(text, cwd=cwd or ".", env=env or {}, user=user)
    return text


def wire(text: str, token: str, via: Via, *, stdin: bool = False) -> Wire:
    """`text` as a command line that any login shell passes to sh unchanged, with the header line.

    Without `stdin` the command reads from /dev/null.
    """
    no_input = "" if stdin else NO_INPUT
    if via:
        body = f"{no_input}echo ::vmtasks:{token}:$$:{via} >&2; {text}"
    else:
        first = f"{no_input}kill -0 -$$ 2>/dev/null && set -- $$ || set -- 0; echo ::vmtasks:{token}:$1"
        forms = {name: f"{first}:{name} >&2; set --; {text}" for name in ("setsid", "sh")}
        body = f"{GROUP_FIRST}exec setsid /bin/sh -c {shlex.quote(forms['setsid'])}\n{forms['sh']}"
    program = "setsid /bin/sh" if via == "setsid" else "/bin/sh"
    line = ssh.remote_line(body, program)
    if len(line) <= ssh.LINE_BYTES:
        return Wire(line, b"", token)
    return Wire(ssh.remote_line(READ + RUN, program), ssh.printf_escape(body).encode() + b"\n", token)


def waiting_shell_line(token: str, via: Via) -> str:
    """The command line of a shell that prints its header and then waits on stdin; see waiting_shell_input().

    It prints the header again once it has the text: a shell that ends before has run nothing.
    """
    header = f"echo ::vmtasks:{token}:$$:{via} >&2; "
    text = header + READ + header + RUN
    return ssh.remote_line(text, "setsid /bin/sh" if via == "setsid" else "/bin/sh")


def waiting_shell_input(text: str, *, stdin: bool) -> bytes:
    """The line that makes a waiting shell run `text`. Without `stdin` the command reads from /dev/null."""
    body = text if stdin else NO_INPUT + text
    # Some shells' read changes bytes beyond ASCII.
    return (f"={body}" if body.isascii() and body.isprintable() else ssh.printf_escape(body)).encode() + b"\n"


class Header:
    """Strips the header lines from stderr, and any output of the login shell before them."""

    def __init__(self, token: str, times: int = 1) -> None:
        """`token` is the command's. `group` and `via` are set by the first header line, `seen` after `times` lines."""
        self._line = re.compile(rb"::vmtasks:" + token.encode() + rb":(\d+):(\w*)\n")
        self._held = b""
        self._left = times
        self.group = 0
        self.via: Via = ""

    @property
    def seen(self) -> bool:
        """Whether the command may have started."""
        return not self._left

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of stderr that are the command's; b'' until the header is complete."""
        if self.seen:
            return data
        self._held += data
        while self._left and (found := self._line.search(self._held)):
            self.group = int(found[1])
            self.via = "setsid" if found[2] == b"setsid" else "sh"
            self._held = self._held[found.end() :]
            self._left -= 1
        if not self.seen:
            return b""
        rest, self._held = self._held, b""
        return rest

    def rest(self) -> bytes:
        """Return the bytes held back for a header that never came: the command did not run."""
        return b"" if self.seen else self._held


class Lines:
    """Splits bytes into whole lines, with the unfinished last one at the end. Never splits a character."""

    def __init__(self, stream: Stream, on_line: OnLine) -> None:
        """`on_line` gets each line without its line feed, decoded as UTF-8 with replacements."""
        self._stream: Stream = stream
        self._on_line = on_line
        self._held: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Pass on each line that is now complete."""
        first, *more = data.split(b"\n")
        self._held.append(first)
        for part in more:
            self._on_line(b"".join(self._held).decode(errors="replace"), self._stream)
            self._held = [part]

    def end(self) -> None:
        """Pass on the last line if it has no line feed."""
        rest = b"".join(self._held)
        if rest:
            self._on_line(rest.decode(errors="replace"), self._stream)
        self._held = []
