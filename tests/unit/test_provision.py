"""provision.sh, run by this host's sh, and what the host makes of what it says."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from vmtasks.byhand.provision import _judge
from vmtasks.errors import PhaseError, SshError, VmTasksError
from vmtasks.guest import ssh
from vmtasks.host import process
from vmtasks.qemu.console import Account

SHIPPED = Path(__file__).parents[2] / "vmtasks/media/phase"
TOKEN = "0123456789abcdef"  # noqa: S105 - of a line, not of a person


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """What is sent to a guest, without a phase.sh."""
    folder = tmp_path / "sent"
    folder.mkdir()
    for name in ("lib.sh", "provision.sh"):
        shutil.copy2(SHIPPED / name, folder / name)
    return folder


def start(media: Path, script: str) -> subprocess.Popen[bytes]:
    (media / "phase.sh").write_text(script)
    env = {"PATH": os.environ["PATH"], "VMTASKS_MEDIA": str(media), "VMTASKS_TOKEN": TOKEN}
    words, pipe = ["sh", media / "provision.sh"], subprocess.PIPE
    return subprocess.Popen(words, env=env, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True)


def hear(output: bytes) -> Account:
    heard = Account(TOKEN, lambda _: None)
    for n in range(0, len(output), 7):
        heard.feed(output[n : n + 7])
    return heard


@pytest.mark.parametrize(
    ("script", "status", "step"),
    [
        ("step 'one'\nstep 'two'\ntrue\n", 0, "two"),
        ("step 'one'\n(exit 7)\nstep 'two'\n", 7, "one"),
        ("step 'one'\nexit 9\n", 9, "one"),
        ("step 'one'\nfail 'no such luck'\n", 1, "one"),
        ("step 'one'\nnone-such-command\n", 127, "one"),
        ("step 'one'\nkill -KILL $$\n", 137, "one"),
        ('[ "$VMTASKS_SSH" = yes ]\n', 0, ""),
    ],
)
def test_every_end_has_its_verdict(media: Path, script: str, status: int, step: str) -> None:
    run = start(media, script)
    heard = hear(run.communicate(timeout=30)[0])
    assert (heard.status, heard.step, run.returncode) == (status, step, status)


def test_an_unreadable_script_does_not_get_past_the_verdict(media: Path) -> None:
    run = start(media, "if true\n")
    assert hear(run.communicate(timeout=30)[0]).status not in (0, None)


def test_who_is_ended_says_so(media: Path) -> None:
    """As at the deadline, when the whole process group is ended."""
    run = start(media, "step 'long'\nsleep 60\n")
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGTERM)
    assert hear(run.communicate(timeout=30)[0]).status == 143


def test_lines_of_others_are_not_taken_for_ours() -> None:
    heard = hear(b"::vmtasks:ffffffffffffffff:exit 0 x\n+ 1: echo ::vmtasks:%s:exit 0\n" % TOKEN.encode())
    assert heard.status is None


@pytest.mark.parametrize(
    ("output", "ended", "kind", "says"),
    [
        (f"::vmtasks:{TOKEN}:step a\n+ 3: ls /x\n::vmtasks:{TOKEN}:exit 2 a\n", 2, PhaseError, "2 (line 3: ls /x) at"),
        (
            f"::vmtasks:{TOKEN}:step a\n",
            process.AT_DEADLINE,
            PhaseError,
            "did not end within 5.0 s and was ended at step 'a'",
        ),
        (f"::vmtasks:{TOKEN}:step a\n", ssh.FAILED, SshError, "the connection was lost at step 'a'; how"),
        (
            f"::vmtasks:{TOKEN}:step a\n",
            process.TIMED_OUT,
            PhaseError,
            "ended with 124 and without a verdict at step 'a'",
        ),
        ("", 0, PhaseError, "ended with 0 and without a verdict"),
        ("no doas here\n", 126, PhaseError, "ended with 126 and without a verdict"),
    ],
)
def test_the_cause_of_each_failure(
    output: str, ended: process.Ended | int, kind: type[VmTasksError], says: str, tmp_path: Path
) -> None:
    how = process.Ended(ended) if isinstance(ended, int) else ended
    with pytest.raises(kind) as caught:
        _judge("provision", hear(output.encode()), how, tmp_path / "log", 5.0)
    assert says in caught.value.message
    assert caught.value.log == tmp_path / "log"
