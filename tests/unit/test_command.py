"""How a command reaches a guest: through any login shell, in a group of its own, with the line that names the group."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from vmtasks.errors import ConfigError
from vmtasks.guest import command, ssh
from vmtasks.guest.command import Header, Lines, Via

SHELLS = {
    name: [path, *words, "-c"]
    for name, words in {"sh": (), "dash": (), "bash": (), "busybox": ("sh",), "csh": (), "tcsh": (), "zsh": ()}.items()
    if (path := shutil.which(name))
}
ODD = ["it's", 'a "b"', "$HOME `id`", "\\ \\n \\0", "!! a!b", "a\nb\n\nc", "é€😀", "-n", "", "*", "~", "%s %d", "#"]


def run(
    shell: str, wire: command.Wire, home: Path, *, leads: bool, stdin: bytes = b""
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command line as a server does: `leads` as OpenSSH's, in a group of its own; dropbear makes none."""
    return subprocess.run(
        [*SHELLS[shell], wire.line],
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        input=wire.preamble + stdin,
        capture_output=True,
        timeout=30,
        check=False,
        start_new_session=leads,
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("via", "leads"), [("", True), ("", False), ("sh", True), ("setsid", False)])
@pytest.mark.parametrize("size", [0, 20_000])
def test_any_login_shell_runs_a_command_in_a_group_of_its_own(
    shell: str,
    via: Via,
    leads: bool,  # noqa: FBT001
    size: int,
    tmp_path: Path,
):
    words = [*ODD, "x" * size]
    text = f"ps -o pgid= -p $$; {command.script(['printf', '<%s>', *words])}"
    done = run(shell, command.wire(text, "0f0f", via), tmp_path, leads=leads)
    header = Header("0f0f")
    assert header.feed(done.stderr) == b""
    group, _, rest = done.stdout.decode().partition("\n")
    assert int(group) == header.group != os.getpgid(0)
    assert header.via == (via or ("sh" if leads else "setsid"))
    assert rest == "".join(f"<{word}>" for word in words)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("via", ["", "sh", "setsid"])
def test_input_status_and_streams(shell: str, via: Via, tmp_path: Path):
    data = bytes(range(256)) * 300
    done = run(
        shell, command.wire("cat; echo err >&2; exit 9", "1", via, stdin=True), tmp_path, leads=False, stdin=data
    )
    assert (done.stdout, done.returncode) == (data, 9)
    assert Header("1").feed(done.stderr) == b"err\n"
    none = run(shell, command.wire("cat", "1", via), tmp_path, leads=False, stdin=data)
    assert (none.stdout, none.returncode) == (b"", 0)
    long = command.wire("cat; exit 3 #" + "é" * 9000, "1", via, stdin=True)
    assert len(long.line) < ssh.LINE_BYTES
    done = run(shell, long, tmp_path, leads=False, stdin=data)
    assert (done.stdout, done.returncode) == (data, 3)


@pytest.mark.parametrize("via", ["", "sh", "setsid"])
def test_a_program_that_a_signal_ends_is_not_an_exit(via: Via, tmp_path: Path):
    line = command.wire(command.script(["sh", "-c", "kill -KILL $$"]), "1", via)
    assert run("sh", line, tmp_path, leads=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("via", ["sh", "setsid"])
@pytest.mark.parametrize("size", [0, 20_000])
def test_a_shell_that_waits_runs_what_comes_and_reads_no_byte_more(shell: str, via: Via, size: int, tmp_path: Path):
    data = bytes(range(256)) * 300
    words = [*ODD, "x" * size]
    line = command.waiting_shell_line("0f0f", via)

    def given(text: str, *, stdin: bool) -> "subprocess.CompletedProcess[bytes]":
        return run(
            shell,
            command.Wire(line, command.waiting_shell_input(text, stdin=stdin), "0f0f"),
            tmp_path,
            leads=via == "sh",
            stdin=data,
        )

    for text in (command.script(["printf", "<%s>", *words]), "printf '<%s>' a\\b 'it''s' !; set | grep vmtasks_line"):
        plain = run(shell, command.wire(text, "1", via), tmp_path, leads=via == "sh")
        assert given(text, stdin=False).stdout == plain.stdout
    done = given("ps -o pgid= -p $$ >&2; cat; exit 9", stdin=True)
    header = Header("0f0f", 2)
    assert int(header.feed(done.stderr)) == header.group
    assert (done.stdout, done.returncode) == (data, 9)
    assert given("cat", stdin=False).stdout == b""
    never = run(shell, command.Wire(line, b"", "0f0f"), tmp_path, leads=via == "sh")
    assert (never.stdout, never.returncode) == (b"", 0)
    header = Header("0f0f", 2)
    assert (header.feed(never.stderr), header.group > 0, header.seen) == (b"", True, False)
    killed = given(command.script(["sh", "-c", "kill -KILL $$"]), stdin=False)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)  # some login shells make an exit of it


def test_what_no_system_can_take():
    for wrong in ([], "a\0b", ["a", "\0"]):
        with pytest.raises(ConfigError):
            command.script(wrong)
    for more in ({"env": {"A B": "1"}}, {"env": {"A": "\0"}}, {"cwd": "\0"}, {"user": "\0"}):
        with pytest.raises(ConfigError):
            command.script("true", **more)  # type: ignore[arg-type]
    assert command.script(["-x", "a b"]) == "-x 'a b'", "exec would take it for an option"


def test_the_header_is_found_in_pieces_and_behind_what_a_login_shell_says():
    whole = b"bash: warning\n::vmtasks:12:77:setsid\nerr\n::vmtasks:12:78:sh\n"
    header = Header("12")
    out = b"".join(header.feed(whole[n : n + 1]) for n in range(len(whole)))
    assert (out, header.group, header.via) == (b"err\n::vmtasks:12:78:sh\n", 77, "setsid")
    again = Header("12", 2)
    assert b"".join(again.feed(whole[n : n + 1]) for n in range(len(whole))) == b""
    assert (again.seen, again.group, again.rest()) == (True, 78, b"")
    never = Header("12")
    assert never.feed(b"sh: not found\n") == b""
    assert never.rest() == b"sh: not found\n"


def test_lines_are_whole_and_characters_are_not_split():
    seen = []
    lines = Lines("stdout", lambda line, _: seen.append(line))
    for byte in "é1\n\n€2\nhalf".encode():
        lines.feed(bytes([byte]))
    assert seen == ["é1", "", "€2"]
    lines.end()
    assert seen[-1] == "half"
