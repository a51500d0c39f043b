"""provision.sh, run by this host's sh, and what the host makes of what it says."""

import io
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amount import cases
from unit.shellserver import serving
from vmtasks.byhand.provision import _judge, _remove, _run, _send
from vmtasks.errors import PhaseError, SshError, VmTasksError
from vmtasks.guest.link import Link
from vmtasks.qemu.console import ScriptReport

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


def hear(output: bytes) -> ScriptReport:
    heard = ScriptReport(TOKEN, lambda _: None)
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


@pytest.mark.skipif(os.geteuid() != 0, reason="the script is run as root")
@pytest.mark.parametrize(
    ("script", "kind", "says"),
    cases(
        ("step a\nls /no/such\n", PhaseError, "its script exited with 2 ("),
        ("step a\necho cut\nsleep 60\n", SshError, "the connection was lost at step 'a'; how the script ended"),
        more=[
            ("step a\nsleep 60\n", PhaseError, "did not end within 5.0 s; it was ended at step 'a'"),
            ("step a\nkill -KILL $PPID $$\n", PhaseError, "and without a verdict at step 'a'"),
        ],
    ),
)
def test_the_cause_of_each_failure(
    media: Path, script: str, kind: type[VmTasksError], says: str, tmp_path: Path
) -> None:
    (media / "phase.sh").write_text(script)
    home, log, heard = tmp_path / "home", tmp_path / "log", ScriptReport(TOKEN, lambda _: None)
    over = threading.Event()
    with serving(home) as target, Link(target, window_s=5) as link:

        def cut() -> None:
            while not over.wait(0.05):
                if log.exists() and b"\ncut" in log.read_bytes():
                    link.close()
                    return

        with ThreadPoolExecutor(1) as pool:
            pool.submit(cut)
            try:
                end = _run(link, str(media), heard, log, 5.0)
            finally:
                over.set()
    with pytest.raises(kind) as caught:
        _judge("provision", heard, end, log)
    assert says in caught.value.message
    assert caught.value.log == log
    assert b"step a" in log.read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="the script is run as root")
def test_what_is_sent_is_run_and_removed(media: Path, tmp_path: Path) -> None:
    (media / "phase.sh").write_text("step a\necho hello\n")
    archive, heard = io.BytesIO(), ScriptReport(TOKEN, lambda _: None)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in media.iterdir():
            tar.add(path, path.name)
    with serving(tmp_path / "home") as target, Link(target) as link:
        folder = _send(link, archive.getvalue())
        end = _run(link, folder, heard, tmp_path / "log", 20.0)
        _judge("provision", heard, end, tmp_path / "log")
        _remove(link, folder)
        assert not Path(folder).exists()
        with pytest.raises(SshError, match=r"the script could not be sent to .*tar"):
            _send(link, b"no archive")
    assert b"hello" in (tmp_path / "log").read_bytes()
