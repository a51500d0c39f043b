"""The guest's half of the phase contract: run.sh and lib.sh, with a terminal of ours in the place of /dev/console."""

import os
import select
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools import SHELLCHECK
from vmtasks.media import template
from vmtasks.qemu.console import Sentinel, Transcript

TOKEN = "0123456789abcdef"  # noqa: S105
SHELL = os.path.realpath("/bin/sh")
SHELLS = {"as it is": SHELL, "busybox": shutil.which("busybox"), "bash": shutil.which("bash")}
NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
LIMIT_S = 20.0


def namespace_fault() -> str:
    """Why no file can be mounted over another here; empty when one can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    tried = subprocess.run(
        [*NAMESPACE, "mount", "--bind", "/dev/null", "/dev/console"], capture_output=True, check=False
    )
    return tried.stderr.decode().strip()


pytestmark = pytest.mark.skipif(bool(namespace_fault()), reason=f"cannot replace /dev/console: {namespace_fault()}")


@dataclass
class Told:
    """What a phase wrote to the console."""

    text: str = ""
    lines: list[str] = field(default_factory=list)
    sentinels: list[Sentinel] = field(default_factory=list)
    last_command: str = ""

    def kinds(self) -> list[str]:
        return [f"{s.kind} {s.text}".strip() for s in self.sentinels]

    def verdict(self) -> str:
        """What the verdict says; it is said three times, each time the same."""
        verdicts = [s.text for s in self.sentinels if s.kind == "exit"]
        assert verdicts == verdicts[:1] * 3
        assert self.sentinels[-1].kind == "exit"
        return verdicts[0]


class Media:
    """A phase's files as a guest finds them on its CD."""

    def __init__(self, folder: Path, shell: str) -> None:
        self.folder = folder
        self.shell = shell
        self.scratch = folder / "tmp"
        self.scratch.mkdir(parents=True)
        self.off = folder / "off"
        for name in ("run.sh", "lib.sh"):
            (folder / name).write_text(template.shipped(name))
        (folder / "token").write_text(TOKEN + "\n")
        # What powers a guest off ends all that runs in it, at once.
        (folder / "poweroff").write_text(f"touch {shlex.quote(str(self.off))}; kill -9 $$\n")

    def run(self, script: str, *, tmp: str = "", ends_with: int = -signal.SIGKILL) -> Told:
        (self.folder / "phase.sh").write_text(script)
        master, slave = os.openpty()
        mount = f'mount --bind {os.ttyname(slave)} /dev/console && mount --bind "$0" {SHELL} && exec /bin/sh "$1"'
        argv = [*NAMESPACE, "/bin/sh", "-c", mount, self.shell, str(self.folder / "run.sh")]
        told, console, data = Told(), Transcript(), b""
        with subprocess.Popen(
            argv, env={**os.environ, "TMPDIR": tmp or str(self.scratch)}, stdin=subprocess.DEVNULL
        ) as child:
            end = time.monotonic() + LIMIT_S
            while child.poll() is None or select.select([master], [], [], 0)[0]:
                if time.monotonic() > end:
                    child.kill()
                    raise AssertionError(f"run.sh did not end: {data!r}")
                if select.select([master], [], [], 0.02)[0]:
                    data += os.read(master, 65536)
        os.close(master)
        os.close(slave)
        assert child.returncode == ends_with
        assert self.off.exists()
        self.off.unlink()
        told.sentinels = console.feed(data)
        assert {s.token for s in told.sentinels} == {TOKEN}
        told.text, told.lines, told.last_command = data.decode(), list(console.lines), console.last_command
        return told


@pytest.fixture(params=SHELLS)
def media(request: pytest.FixtureRequest, tmp_path: Path) -> Media:
    shell = SHELLS[request.param]
    if shell is None:
        pytest.skip(f"{request.param} is not installed")
    return Media(tmp_path / "media with 'odd' name", shell)


@pytest.mark.parametrize("script", ["true", "exit 7"])
def test_a_system_that_ends_the_wrapper_in_order_to_power_off_need_not_wait(media: Media, script: str):
    """As systemd does: `poweroff` returns at once, and then SIGTERM goes to all that runs, and is waited for."""
    off = shlex.quote(str(media.off))
    (media.folder / "poweroff").write_text(f"touch {off}; (sleep 0.5; kill $$) &\n")
    told = media.run(script, ends_with=-signal.SIGTERM)
    assert told.verdict().split()[0] in ("0", "7")
    (media.folder / "poweroff").write_text(f"kill $$; touch {off}\n")
    assert media.run(script, ends_with=int(told.verdict().split()[0])).verdict() == told.verdict()


ENDINGS = {
    "success": ("true", "0"),
    "nothing": ("", "0"),
    "only a comment, no line break": ("# nothing", "0"),
    "exit with a status": ("exit 7", "7"),
    "exit without a status": ("true; exit", "0"),
    "exit in a subshell": ("(exit 3)\ntrue", "3"),
    "failed command": ("false\ntrue", "1"),
    "failed command in a function": ("f() { false; true; }\nf\ntrue", "1"),
    "failed command whose failure is expected": ("if false; then :; fi\nfalse || true", "0"),
    "failed command at the end of a list": ("false && true\ntrue", "0"),
    "failure is ignored": ("set +e\nfalse\ntrue", "0"),
    "the last failure is not ignored": ("set +e\ntrue\nfalse", "1"),
    "return": ("return 5", "5"),
    "killed": ("kill -9 $$", "137"),
    "terminated": ("kill -TERM $$", "143"),
    "another program in its place": ("exec sh -c 'exit 9'", "9"),
    "standard output closed": ("exec >&- 2>&-\nexit 4", "4"),
    "standard input is empty": ('read -r line && exit 1\ntest -z "$line"', "0"),
    "its own trap": ("trap 'echo mine' 0\nexit 6", "6"),
    "its own trap exits": ("trap 'exit 8' 0\nfalse", "8"),
    "variables unset": ("unset VMTASKS_TOKEN VMTASKS_STEP VMTASKS_MEDIA PATH\nexit 2", "2"),
    "functions redefined": ("say() { :; }\nstep() { :; }\nverdict() { :; }\nfail() { :; }\nexit 2", "2"),
    "fails": ('fail "for a reason"', "1"),
    "in another folder": ("cd /tmp\nexit 3", "3"),
    "fills in arguments": ("set -- a b c\ntest $# = 3", "0"),
    "leaves a process behind": ("sleep 30 >/dev/null 2>&1 &\nkill $! \nexit 0", "0"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_verdict_is_said_however_the_script_ends(ending: str, media: Media):
    script, status = ENDINGS[ending]
    told = media.run(script)
    assert told.verdict() == status
    assert told.kinds()[0] == "begin"


@pytest.mark.parametrize(
    "script", ["if true; then", "echo 'open", "no-such-command --here", ")", "set -u\necho $unset"]
)
def test_a_broken_script_fails(script: str, media: Media):
    assert int(media.run(script + "\n").verdict()) > 0


@pytest.mark.parametrize("signal", ["HUP", "INT", "QUIT", "PIPE", "TERM"])
def test_a_verdict_is_said_when_the_wrapper_is_signalled(signal: str, media: Media):
    assert int(media.run(f"kill -{signal} $PPID\nsleep 0.1\n").verdict()) > 128


def test_steps(media: Media):
    told = media.run('step one\nstep "two words"\nstep three  words apart\nexit 7\n')
    assert told.kinds()[:4] == ["begin", "step one", "step two words", "step three words apart"]
    assert told.verdict() == "7 three words apart"


@pytest.mark.parametrize(
    "title",
    [
        "it's",
        'a "b"',
        "100 %d %s",
        "a\\nb \\\\ \\0",
        "$HOME `id` $(id)",
        "-n x",
        "*",
        "é",
        "::vmtasks:x:exit 0",
        "&|;<>",
        "\\c",
    ],
)
def test_titles_are_shown_as_they_are(title: str, media: Media):
    quoted = "'" + title.replace("'", "'\\''") + "'"
    told = media.run(f"step {quoted}\nexit 3\n")
    assert told.kinds()[1] == f"step {title}"
    assert told.verdict() == f"3 {title}"


def test_an_echo_of_the_script_is_not_a_sentinel(media: Media):
    told = media.run(
        "set -v\n"
        f"echo ' ::vmtasks:{TOKEN}:exit 0'\n"
        'vmtasks_say "step traced"\n'
        'cat "$VMTASKS_MEDIA/phase.sh"\n'
        "step next\n"
        "exit 4\n"
    )  # fmt: skip
    assert told.kinds()[:3] == ["begin", "step traced", "step next"]
    assert told.verdict() == "4 next"


def test_output_without_a_line_break_does_not_hide_a_sentinel(media: Media):
    told = media.run("printf 'half a line'\nstep one\nprintf 'half a line'\nexit 5\n")
    assert told.kinds()[1] == "step one"
    assert told.verdict() == "5 one"


def test_the_last_command_is_in_the_log(media: Media):
    told = media.run("step one\ntrue\ncp /no/such/file /tmp/x\n")
    assert told.verdict() == "1 one"
    assert told.last_command.removeprefix("line 3: ") == "cp /no/such/file /tmp/x"


def test_the_last_command_is_the_one_before_an_exit(media: Media):
    told = media.run("step one\nif ! test -e /no/such/file; then\n    exit 2\nfi\n")
    assert told.last_command.removeprefix("line 2: ") == "test -e /no/such/file"


def test_what_is_said_is_not_traced(media: Media):
    told = media.run("say 'for the reader'\nstep one\ntrue\n")
    assert "for the reader" in told.lines
    assert not [line for line in told.lines if "printf" in line or "VMTASKS" in line or "set -x" in line]
    assert [line for line in told.lines if line.endswith(": true")], "tracing goes on"


def test_hostkey(media: Media):
    key = media.folder / "key.pub"
    key.write_text("ssh-ed25519 AAAAC3Nza+/= root@guest with words\n")
    bare = media.folder / "bare.pub"
    bare.write_text("ssh-rsa AAAAB3")
    told = media.run('hostkey "$VMTASKS_MEDIA/key.pub"\nhostkey "$VMTASKS_MEDIA/bare.pub"\n')
    assert told.kinds()[1:3] == ["hostkey ssh-ed25519 AAAAC3Nza+/=", "hostkey ssh-rsa AAAAB3"]
    assert told.verdict() == "0"


@pytest.mark.parametrize("content", [None, "", "ssh-ed25519\n"])
def test_a_host_key_that_is_none_fails(content: str | None, media: Media):
    """Also after one that was read: its key must not be told a second time."""
    (media.folder / "good.pub").write_text("ssh-ed25519 AAAA\n")
    if content is not None:
        (media.folder / "bad.pub").write_text(content)
    told = media.run('hostkey "$VMTASKS_MEDIA/good.pub"\nhostkey "$VMTASKS_MEDIA/bad.pub"\n')
    assert [k for k in told.kinds() if k.startswith("hostkey")] == ["hostkey ssh-ed25519 AAAA"]
    assert told.verdict() == "1"


def test_retry(media: Media):
    told = media.run(
        'count=0\ntwice() { count=$((count + 1)); test "$count" -ge 2; }\nretry 3 twice\nstep "$count"\nretry 1 false\n'
    )
    assert told.kinds()[1] == "step 2"
    assert told.verdict() == "1 2"


def test_no_place_for_the_title_of_the_step(media: Media):
    """Without a writable /tmp the phase runs all the same; the host has heard the titles."""
    told = media.run("step one\nexit 3\n", tmp="/no/such/folder")
    assert told.kinds()[:2] == ["begin", "step one"]
    assert told.verdict() == "3"


def test_the_place_for_the_title_is_lost_on_the_way(media: Media):
    told = media.run('rm -rf "$TMPDIR"\nstep one\nexit 3\n')
    assert told.kinds()[1] == "step one"
    assert told.verdict() == "3"


def test_path_and_folder_do_not_depend_on_who_starts_it(media: Media):
    told = media.run('say "$PATH"\nsay "$(pwd)"\nsay "$VMTASKS_MEDIA"\n')
    assert "/sbin:/bin:/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin" in told.lines
    assert "/" in told.lines
    assert str(media.folder) in told.lines


def test_the_shipped_shell_files_are_clean(tmp_path: Path):
    for name in ("lib.sh", "run.sh"):
        (tmp_path / name).write_text(template.shipped(name))
    checked = subprocess.run(
        [SHELLCHECK, "-s", "sh", "lib.sh", "run.sh"], cwd=tmp_path, capture_output=True, check=False
    )
    assert checked.stdout.decode() == ""
