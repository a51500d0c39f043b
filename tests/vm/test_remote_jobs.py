"""Jobs: commands that outlive their connection. C9 to C13 of docs/parity.md."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from remotes import LIMIT_S, Guest, processes, until_true

from amount import cases
from vmtasks.errors import CommandTimeoutError, ConfigError, RebootedError, SshError, StateError
from vmtasks.guest import job
from vmtasks.guest.link import Link

pytestmark = pytest.mark.timeout(900)

ODD = ["it's", 'a "b"', "$HOME `id` $(id)", "back\\slash \\n", "!x", "a\nb\n\nc", "é€😀", "-n", "", "*", "%s", "#"]
COUNT = "echo once >>runs; n=0; while [ $n -lt {lines} ]; do n=$((n+1)); echo line $n é; sleep {pause}; done; exit 7"
CLIENT = """
import json, pathlib, sys
from vmtasks.guest import job
from vmtasks.guest.link import Link
from vmtasks.guest.ssh import Target
name, port, user, key, host_keys, folder, which, path = json.loads(sys.argv[1])
target = Target(name, port, user, pathlib.Path(key), tuple(host_keys), pathlib.Path(folder))
with Link(target) as link, open(path, "ab", buffering=0) as file:
    job.follow(link, which, offset=file.tell(), timeout_s=300, on_data=lambda data, _: file.write(data))
"""


@pytest.fixture
def link(guest: Guest) -> Iterator[Link]:
    with guest.link(console=guest.console, alive=guest.runs) as made:
        made.execute("rm -f runs", timeout_s=LIMIT_S)
        yield made


def expected(lines: int) -> bytes:
    return "".join(f"line {n} é\n" for n in range(1, lines + 1)).encode()


def runs(link: Link) -> bytes:
    return link.execute("cat runs", timeout_s=LIMIT_S).stdout


# ---- what comes back


@pytest.mark.parametrize("status", cases(0, 255, more=[1, 42, 126, 127, 130, 137]))
def test_c11_every_status_of_a_job_comes_back(link: Link, status: int) -> None:
    end = job.run(link, f"exit {status}", timeout_s=LIMIT_S)
    assert (end.status, end.signal, end.view.state) == (status, "", "ended")


@pytest.mark.parametrize("name", cases("KILL", more=["TERM", "HUP", "SEGV"]))
def test_c11_a_signal_is_told_from_a_status(link: Link, name: str) -> None:
    for command in (["sh", "-c", f"kill -{name} $$"], f"kill -{name} $$"):
        end = job.run(link, command, timeout_s=LIMIT_S)
        assert (end.status, end.signal) == (128 + getattr(signal, f"SIG{name}"), name)


def test_c11_another_user_cannot_write_its_own_status(link: Link) -> None:
    forge = "d=$(echo ~dev/.vmtasks/jobs/*); echo 'exit 0 1' >$d/status; rm -rf $d; mv $d $d.old; kill -9 $(cat $d/pid)"
    end = job.run(link, f"( {forge} ) 2>&1; kill -9 -1; id -un; exit 7", user="nobody", timeout_s=LIMIT_S)
    assert (end.status, end.view.state) == (7, "ended")
    assert end.stdout.endswith(b"nobody\n")


@pytest.mark.exhaustive
def test_c9_what_a_job_is_given_and_what_it_writes(link: Link) -> None:
    words = "".join(f"<{word}>" for word in ODD).encode()
    end = job.run(link, ["printf", "<%s>", *ODD], timeout_s=LIMIT_S)
    assert (end.stdout, end.stderr, end.status) == (words, b"", 0)
    text = 'id -un; pwd; umask; printf "<%s>" "$V"; echo " $#"; cat; kill -INT $$; echo "not ended'
    end = job.run(link, text + '"', user="root", cwd="/tmp", env={"V": "it's\n!"}, timeout_s=LIMIT_S)  # noqa: S108
    assert end.stdout.startswith(b"root\n/tmp\n0022\n<it's\n!> 0\n")
    assert b"not ended" not in end.stdout
    assert end.status == 130
    both = job.run(link, "printf a; printf b >&2; printf c", split=True, timeout_s=LIMIT_S)
    assert (both.stdout, both.stderr) == (b"ac", b"b")
    assert job.run(link, "printf a; printf b >&2; printf c", timeout_s=LIMIT_S).stdout == b"abc"
    assert job.read(link, both.view.job) == (b"ac", b"b")
    big = job.run(link, "head -c 3000000 /dev/zero; yes err | head -c 3000000 >&2", split=True, timeout_s=LIMIT_S)
    assert (big.stdout, big.stderr) == (bytes(3_000_000), b"err\n" * 750_000)
    script = "# " + "x" * 200_000 + "\necho long"
    assert job.run(link, script, timeout_s=LIMIT_S).stdout == b"long\n"


@pytest.mark.exhaustive
def test_jobs_are_listed_and_removed(link: Link) -> None:
    first = job.start(link, "echo one; sleep 300", title="it's a\ntitle")
    second = job.start(link, ["echo", "two"])
    job.follow(link, second, timeout_s=LIMIT_S)
    views = {view.job: view for view in job.listing(link)}
    assert (views[first].title, views[first].state, views[first].status) == ("it's a title", "running", None)
    assert (views[second].title, views[second].state, views[second].size) == ("echo two", "ended", 4)
    assert 0 < views[first].started <= views[second].ended
    modes = link.execute(f"stat -c %a .vmtasks/jobs/{first} .vmtasks/jobs/{first}/log", timeout_s=LIMIT_S).stdout
    assert modes == b"700\n600\n"
    with pytest.raises(StateError, match="runs"):
        job.remove(link, first)
    done = job.cancel(link, first)
    assert (done.signal, done.cancelled) == ("TERM", True)
    for one in (first, second):
        job.remove(link, one)
    assert not {first, second} & {view.job for view in job.listing(link)}
    assert job.show(link, first) is None
    for action in (job.read, job.cancel):
        with pytest.raises(StateError, match="has no job"):
            action(link, first)
    with pytest.raises(StateError, match="has no job"):
        job.follow(link, first, timeout_s=LIMIT_S)
    for wrong in ("../x", "", "0" * 15, "0" * 17, "$(id)0000000000"):
        with pytest.raises(ConfigError, match="not the id of a job"):
            job.show(link, wrong)


@pytest.mark.exhaustive
def test_c10_a_deadline_ends_the_job_and_all_that_it_started(link: Link) -> None:
    text = "trap '' TERM; echo it\\'s begun; sleep 4721 & sleep 4721 | sleep 4721"
    for user in ("", "root"):
        with pytest.raises(CommandTimeoutError, match=r"it was ended") as late:
            job.run(link, text, user=user, timeout_s=2)
        assert late.value.which == "overall"
    with pytest.raises(CommandTimeoutError, match="fell silent") as late:
        job.run(link, "echo begun; sleep 4721", timeout_s=LIMIT_S, idle_s=2)
    assert late.value.which == "idle"
    left = "ps -o stat,args | grep '[s]leep 4721'"
    assert link.execute(left, timeout_s=LIMIT_S).stdout == b""


@pytest.mark.exhaustive
def test_c10_a_job_whose_runner_was_killed_is_lost_and_says_so(link: Link) -> None:
    which = job.start(link, "echo begun; sleep 300")
    view = job.show(link, which)
    assert view
    link.execute(f"kill -9 $(cat .vmtasks/jobs/{which}/pid)", timeout_s=LIMIT_S)
    seen: list[bytes] = []
    with pytest.raises(SshError, match="its runner in the guest was killed"):
        job.follow(link, which, timeout_s=LIMIT_S, on_data=lambda data, _: seen.append(data))
    assert b"".join(seen) == b"begun\n"
    lost = job.show(link, which)
    assert lost
    assert lost.state == "lost"
    link.execute(f"kill -9 -{view.group}", timeout_s=LIMIT_S)
    # Somebody else's process under the number of ours.
    link.execute(f"sleep 4722 >/dev/null 2>&1 & echo $! >.vmtasks/jobs/{which}/pid; exit 0", timeout_s=LIMIT_S)
    found = job.show(link, which)
    assert found
    assert found.state == "lost", "a number alone proves nothing"


# ---- connections that break


def cut_session(guest: Guest) -> None:
    guest.root(f"for p in $({processes('!=')}); do kill -9 $p; done & :")


def cut_server(guest: Guest) -> None:
    guest.without_server(3, sessions=True)
    time.sleep(6)


def cut_link(guest: Guest, seconds: float = 6) -> None:
    guest.qmp("set_link", name="net0", up=False)
    time.sleep(seconds)
    guest.qmp("set_link", name="net0", up=True)


def pause(guest: Guest) -> None:
    with guest.paused():
        time.sleep(7)


CUTS = [cut_session, cut_server, cut_link, pause]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("cuts", "lines"),
    [
        pytest.param([*CUTS, cut_session], 60, id="each way"),
        pytest.param(
            [cut_session, cut_server, lambda guest: cut_link(guest, 20), pause, *CUTS, cut_session, cut_session],
            400,
            id="ten times",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_c9_lines_arrive_once_each_however_often_the_connection_breaks(
    guest: Guest, link: Link, cuts: list[Callable[[Guest], None]], lines: int
) -> None:
    seen = bytearray()
    whole: list[str] = []
    with guest.link(keepalive_s=1) as own, ThreadPoolExecutor(1) as pool:
        follow = pool.submit(
            job.run,
            own,
            COUNT.format(lines=lines, pause=0.5),
            timeout_s=360,
            on_data=lambda data, _: seen.extend(data),
            on_line=lambda line, _: whole.append(line),
        )
        for cut in cuts:
            before = len(seen)
            until_true(lambda before=before: len(seen) > before or follow.done(), "more lines")
            cut(guest)
        end = follow.result(300)
    assert bytes(seen) == expected(lines)
    assert end.stdout == bytes(seen)
    assert "".join(f"{line}\n" for line in whole).encode() == bytes(seen)
    assert end.status == 7
    assert runs(link) == b"once\n"


def test_c9_a_client_that_was_killed_is_followed_by_another(guest: Guest, link: Link, tmp_path: Path) -> None:
    which = job.start(link, COUNT.format(lines=25, pause=0.2))
    path = tmp_path / "log"
    path.touch()
    target = guest.target
    words = [target.name, target.port, target.user, str(target.key), target.host_keys, str(target.folder)]
    for _ in range(2):
        argv = [sys.executable, "-c", CLIENT, json.dumps([*words, which, str(path)])]
        before = path.stat().st_size
        with subprocess.Popen(argv) as child:
            until_true(lambda before=before: path.stat().st_size > before or child.poll() is not None, "output")
            child.kill()
    log = path.read_bytes()
    assert expected(25).startswith(log)
    end = job.follow(link, which, offset=len(log), timeout_s=LIMIT_S)
    assert log + end.stdout == expected(25)
    assert (end.status, runs(link)) == (7, b"once\n")


@pytest.mark.exhaustive
def test_a_start_whose_outcome_is_not_known_is_found_and_not_repeated(guest: Guest, link: Link) -> None:
    """The guest hangs as the order is sent, until the client has given the connection up; then it reads it."""
    with guest.link(keepalive_s=0.5, connect_s=2) as own:
        own.boot()
        ids: list[str] = []
        guest.qmp("stop")
        timer = threading.Timer(5, guest.qmp, ["cont"])
        timer.start()
        try:
            end = job.run(own, "echo once >>runs; echo done; exit 3", timeout_s=LIMIT_S, started=ids.append)
        finally:
            timer.join()
            with contextlib.suppress(Exception):
                guest.qmp("cont")
        assert (end.status, end.stdout, end.view.job) == (3, b"done\n", ids[0])
    time.sleep(1)
    assert runs(link) == b"once\n"
    assert job.start(link, "echo once >>runs", job=ids[0]) == ids[0], "an id is started once"
    assert runs(link) == b"once\n"


@pytest.mark.exhaustive
def test_jobs_that_start_at_once_share_nothing(guest: Guest, link: Link) -> None:
    def one(number: int) -> bytes:
        with guest.link() as own:
            return job.run(own, f"echo job {number}; sleep 1; echo end {number}", timeout_s=120).stdout

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [f"job {n}\nend {n}\n".encode() for n in range(4)]
    ids = [view.job for view in job.listing(link)]
    assert len(ids) == len(set(ids))


@pytest.mark.exhaustive
def test_c13_a_reboot_ends_a_job_and_its_log_is_still_there(guest: Guest, link: Link) -> None:
    over = job.run(link, "sync; exit 7", timeout_s=LIMIT_S).view.job
    link.execute("sync", timeout_s=LIMIT_S)
    text = "for n in 1 2 3; do echo line $n; done; sync; sleep 300"
    which = job.start(link, text)
    seen: list[str] = []
    timer = threading.Timer(3, lambda: guest.qmp("system_reset"))
    timer.start()
    with guest.link(keepalive_s=1) as own, pytest.raises(RebootedError):
        job.follow(own, which, timeout_s=600, on_line=lambda line, _: seen.append(line))
    timer.join()
    assert seen == ["line 1", "line 2", "line 3"]
    view = job.show(link, which)
    assert view
    assert view.state == "rebooted"
    assert job.cancel(link, which).state == "rebooted", "nothing is signalled"
    with pytest.raises(RebootedError):
        job.follow(link, which, timeout_s=LIMIT_S)
    assert job.read(link, which)[0] == b"line 1\nline 2\nline 3\n"
    ended = job.show(link, over)
    assert ended
    assert (ended.state, ended.status) == ("ended", 7), "one that was over before stays over"
