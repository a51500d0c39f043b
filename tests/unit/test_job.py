"""Jobs against a guest that lies: what stands in a job's folder is input as any other. A real server, a real shell."""

import itertools
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unit.shellserver import serving
from vmtasks.errors import SshError
from vmtasks.guest import job
from vmtasks.guest.link import Link

LIMIT_S = 30.0
JOBS = ".vmtasks/jobs"
HERE = f"$HOME/{JOBS}/*"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def link(home: Path) -> Iterator[Link]:
    with serving(home) as target, Link(target) as made:
        yield made


def running(link: Link) -> str:
    """The id of a job that has come to run."""
    which = job.start(link, "sleep 300; exit 7")
    until = time.monotonic() + LIMIT_S
    while not (view := job.show(link, which)) or view.state != "running":
        assert time.monotonic() < until
        time.sleep(0.05)
    return which


# ---- a verdict is the keeper's


@pytest.mark.parametrize(
    "forge",
    [
        f"for d in {HERE}; do echo 'exit 0 1' >$d/status; done",
        f"for d in {HERE}; do mkdir $d/status; done",
        f"for d in {HERE}; do ln -s /dev/zero $d/status; done",
        f"for d in {HERE}; do echo 'exit 0 1' >$d/status; chmod 400 $d/status; chmod 500 $d; done",
        f"for d in {HERE}; do mkdir $d/status.new; done",
        f"for d in {HERE}; do echo 'exit 0 1' >$d/forged; ln -s forged $d/status.new; ln -s forged $d/status; done",
        f"for d in {HERE}; do rm -f $d/why; mkfifo $d/why; done",
    ],
)
def test_a_command_that_writes_a_status_itself_is_not_believed(link: Link, forge: str):
    end = job.run(link, f"{forge}; exit 7", timeout_s=LIMIT_S)
    assert (end.status, end.view.state) == (7, "ended")
    (view,) = job.listing(link)
    assert view.status == 7


def test_a_status_is_not_believed_while_the_job_runs(link: Link, home: Path):
    which = running(link)
    (home / JOBS / which / "status").write_text("exit 0 1\n")
    view = job.show(link, which)
    assert view
    assert (view.state, view.status) == ("running", None)
    done = job.cancel(link, which)
    assert (done.state, done.cancelled) == ("ended", True)
    assert done.status != 0


# ---- damage is one job's own


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _link_to(where: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(where)

    return make


def _text(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return make


DAMAGE = {
    "empty": _text(b""),
    "one byte": _text(b"e"),
    "garbage": _text(bytes(range(256)) * 40),
    "half": _text(b"exit"),
    "words": _text(b"exit seven now\n"),
    "negative": _text(b"exit -1 -5\n"),
    "huge": _text(b"exit 99999999999999999999999999 " + b"9" * 5000 + b"\n"),
    "signal": _text(b"signal 4000 1\n"),
    "lines": _text(b"exit 7\x0bjob 0123456789abcdef\x85status exit 0 1\n"),
    "digits": _text("exit ٣ ٤\n".encode()),
    "folder": _folder,
    "fifo": _fifo,
    "device": _link_to("/dev/zero"),
    "dangling": _link_to("nowhere"),
}
FILES = ["status", "started", "user", "title", "boot", "pid", "group", "cancelled", "log", "leader", "alive"]


def test_a_damaged_file_is_one_damaged_job(link: Link, home: Path):
    """Each file of a job damaged in each way, and all of them at once; the job beside them is told as ever."""
    sound = job.run(link, "echo sound; exit 3", timeout_s=LIMIT_S).view.job
    first = job.run(link, "exit 4", timeout_s=LIMIT_S).view.job
    told, damaged = {sound: ("ended", 3), first: ("ended", 4)}, []
    for files, kind in itertools.product([[name] for name in FILES] + [FILES], DAMAGE):
        which = f"{len(told):016x}"
        shutil.copytree(home / JOBS / first, home / JOBS / which, ignore=shutil.ignore_patterns("alive"))
        for name in files:
            DAMAGE[kind](home / JOBS / which / name)
        told[which] = ("damaged", None) if "status" in files else ("ended", 4)
        damaged += [which] if kind in ("fifo", "device", "garbage") and "status" in files else []
    views = {view.job: view for view in job.listing(link)}
    assert {which: (view.state, view.status) for which, view in views.items()} == told
    assert views[sound].size == len("sound\n")
    for which in damaged:
        with pytest.raises(SshError, match=r"its status .* cannot be read"):
            job.follow(link, which, timeout_s=LIMIT_S)
        assert job.cancel(link, which).state == "damaged"
        job.remove(link, which)
    assert {view.job for view in job.listing(link)} == told.keys() - set(damaged)


def test_what_is_no_job_is_not_listed(link: Link, home: Path, tmp_path: Path):
    which = job.run(link, "exit 4", timeout_s=LIMIT_S).view.job
    for name in ("x", "0123456789abcdeg", "0123456789abcdef0", "a b", "new\nline", "-n"):
        (home / JOBS / name).mkdir()
        (home / JOBS / name / "status").write_text("exit 0 1\n")
    (home / JOBS / "0123456789abcdef").write_text("exit 0 1\n")
    (tmp_path / "elsewhere").mkdir()
    (home / JOBS / "1123456789abcdef").symlink_to(tmp_path / "elsewhere")
    assert [view.job for view in job.listing(link)] == [which]
    assert job.show(link, "0123456789abcdef") is None
    assert job.show(link, "1123456789abcdef") is None


def test_only_a_group_of_the_job_is_signalled(link: Link, home: Path):
    """What stands in `group` goes to kill(1), maybe as root. Never try 1 or -1 here: they mean all."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as other:
        which = running(link)
        group = (home / JOBS / which / "group").read_bytes()
        (home / JOBS / which / "group").write_text(f"{other.pid}\n")
        with pytest.raises(SshError, match="nothing was signalled"):
            job.cancel(link, which)
        assert other.poll() is None
        (home / JOBS / which / "group").write_bytes(group)
        assert job.cancel(link, which).signal == "TERM"
        other.kill()


def test_nobody_else_can_look_into_jobs(link: Link, home: Path):
    """Also where their folder was there before, open to all."""
    (home / JOBS).mkdir(parents=True)
    for folder in (home / ".vmtasks", home / JOBS):
        folder.chmod(0o777)
    job.run(link, "true", timeout_s=LIMIT_S)
    for folder in (home / ".vmtasks", home / JOBS):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# ---- patience


def test_a_job_is_followed_however_its_first_connections_end(link: Link, home: Path):
    """A guest that lets nobody in for a while, and connections that break before a word of the job has come."""
    which = job.run(link, "echo done; exit 5", timeout_s=LIMIT_S).view.job
    for refuse, cut in ((3, 0), (0, 3), (2, 2)):
        with serving(home, refuse=refuse, cut=cut) as target, Link(target, window_s=LIMIT_S) as late:
            end = job.follow(late, which, timeout_s=LIMIT_S)
            assert (end.stdout, end.status) == (b"done\n", 5)
    for cut in (1, 3):
        with serving(home, cut=cut) as target, Link(target, window_s=LIMIT_S) as late:
            assert [view.job for view in job.listing(late)] == [which]
    with serving(home, refuse=100) as target, Link(target, window_s=2) as late:
        began = time.monotonic()
        with pytest.raises(SshError, match="closed before a server answered"):
            job.follow(late, which, timeout_s=LIMIT_S)
        assert time.monotonic() - began < LIMIT_S
