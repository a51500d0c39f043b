"""Helpers that fail, hang, leave children behind, ignore signals, or must die with us."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.errors import CommandError, MissingToolError
from vmtasks.host import process, processes


def gone(pid: int, within_s: float = 2.0) -> bool:
    """Whether a process is gone, or a zombie that nobody has reaped."""
    end = time.monotonic() + within_s
    while processes.started(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def sh(text: str, *, timeout_s: float = 10, **options: object) -> process.Result:
    return process.run(["sh", "-c", text], timeout_s=timeout_s, **options)


def test_output_and_status():
    result = sh("echo out; echo err >&2; exit 3", check=False)
    assert (result.stdout, result.stderr, result.status) == ("out\n", "err\n", 3)


def test_stdin_is_closed_unless_given():
    assert sh("cat; echo end").stdout == "end\n"
    assert sh("cat", stdin="näh").stdout == "näh"
    assert sh("exec 0<&-; echo no reader", stdin="x" * 1_000_000).stdout == "no reader\n"


def test_bytes_that_are_no_text():
    assert sh(r"printf '\377a'").stdout == "\N{REPLACEMENT CHARACTER}a"


def test_much_output_on_both_streams():
    result = sh("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
    assert (len(result.stdout), len(result.stderr)) == (1_000_000, 1_000_000)


def test_environment_and_folder(tmp_path: Path):
    assert (
        sh('echo "$A $HOME"; pwd', env={"A": "1 2"}, cwd=tmp_path).stdout == f"1 2 {os.environ['HOME']}\n{tmp_path}\n"
    )


def test_failure_says_what_was_run_and_what_it_said():
    with pytest.raises(CommandError, match=r"^sh -c 'echo no >&2; exit 3' exited with 3: no$") as caught:
        sh("echo no >&2; exit 3")
    assert (caught.value.status, caught.value.stderr) == (3, "no\n")
    with pytest.raises(CommandError, match=r"exited with 1: on stdout$"):
        sh("echo on stdout; exit 1")
    with pytest.raises(CommandError, match=r"exited with 1: no output$"):
        sh("exit 1")


def test_death_by_signal_is_told_as_the_shell_does():
    assert sh("kill -9 $$", check=False).status == 137


def test_a_program_that_is_not_installed():
    with pytest.raises(MissingToolError, match="no-such-program is not installed") as caught:
        process.run(["no-such-program"], timeout_s=1)
    assert "apt-get install no-such-program" in caught.value.hint


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1, max_size=4))
def test_quote_is_read_back_by_a_shell(words: list[str]):
    assert shlex.split(process.quote(words)) == words


# ---- deadlines


def test_deadline():
    began = time.monotonic()
    with pytest.raises(CommandError, match=r"did not end within 0\.2 s: so far$") as caught:
        sh("echo so far; sleep 60", timeout_s=0.2)
    assert caught.value.status == process.TIMED_OUT
    assert time.monotonic() - began < 3


def test_deadline_ends_what_the_helper_has_started_too(tmp_path: Path):
    """Its children hold our pipes: to end only the helper would be to wait for them."""
    began = time.monotonic()
    assert sh(f"sleep 60 & echo $! >{tmp_path}/pid; wait", timeout_s=0.3, check=False).status == process.TIMED_OUT
    assert time.monotonic() - began < 3
    assert gone(int((tmp_path / "pid").read_text()))


def test_deadline_of_a_helper_that_ignores_signals():
    began = time.monotonic()
    assert (
        sh("trap '' TERM INT HUP; while :; do sleep 0.1; done", timeout_s=0.2, check=False).status == process.TIMED_OUT
    )
    assert time.monotonic() - began < 3


def test_a_helper_that_has_ended_is_not_late_because_a_daemon_of_its_own_keeps_the_pipe(tmp_path: Path):
    result = sh(f"setsid sleep 60 & echo $! >{tmp_path}/pid; echo done; exit 4", timeout_s=0.5, check=False)
    assert (result.status, result.stdout) == (4, "done\n")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


# ---- stream


def test_stream_hands_on_what_comes_when_it_comes():
    seen: list[tuple[float, bytes]] = []
    began = time.monotonic()
    status = process.stream(
        ["sh", "-c", "echo a; echo b >&2; sleep 0.4; echo c; exit 5"],
        lambda data: seen.append((time.monotonic() - began, data)),
        timeout_s=10,
    )
    assert status == process.Ended(5)
    assert b"".join(data for _, data in seen) == b"a\nb\nc\n"
    assert seen[0][0] < 0.3 < seen[-1][0]


def test_stream_deadline(tmp_path: Path):
    seen: list[bytes] = []
    began = time.monotonic()
    text = f"echo $$ >{tmp_path}/pid; while :; do echo x; sleep 0.05; done"
    assert process.stream(["sh", "-c", text], seen.append, timeout_s=0.4) == process.AT_DEADLINE
    assert time.monotonic() - began < 3
    assert b"x\n" in b"".join(seen)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_status_of_124_is_not_our_deadline():
    """As `timeout 10 make` ends."""
    done = sh("exit 124", check=False)
    assert (done.status, done.timed_out) == (124, False)
    assert process.stream(["sh", "-c", "exit 124"], lambda _: None, timeout_s=10) == process.Ended(124)
    with pytest.raises(CommandError, match="exited with 124") as caught:
        sh("exit 124")
    assert not caught.value.timed_out
    with pytest.raises(CommandError, match=r"did not end within 0\.2 s") as caught:
        sh("sleep 60", timeout_s=0.2)
    assert caught.value.timed_out


def test_stream_ends_the_helper_when_its_reader_fails(tmp_path: Path):
    def fail(data: bytes) -> None:
        raise ValueError(data)

    with pytest.raises(ValueError, match="hello"):
        process.stream(["sh", "-c", f"echo $$ >{tmp_path}/pid; echo hello; exec sleep 60"], fail, timeout_s=10)
    assert gone(int((tmp_path / "pid").read_text()))


def test_stream_of_a_helper_that_closes_its_output_early():
    assert process.stream(
        ["sh", "-c", "exec >&- 2>&-; sleep 0.2; exit 6"], lambda _: None, timeout_s=10
    ) == process.Ended(6)


# ---- spawn


def test_spawn_ends_its_child_however_the_block_ends():
    def fail() -> None:
        with process.spawn(["sleep", "60"]) as child:
            pids.append(child.pid)
            raise KeyboardInterrupt

    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not Path(f"/proc/{pids[0]}").exists(), "ended and reaped"


def test_end_kills_what_ignores_sigterm():
    with process.spawn(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], pipe=True) as child:
        assert child.stdout.readline() == b"ready\n"
        assert process.end(child, grace_s=0.2) == 137
    assert process.end(child) == 137, "ended already"


def test_a_child_has_its_own_group_so_that_ctrl_c_reaches_only_us():
    with process.spawn(["sleep", "60"]) as child:
        assert os.getpgid(child.pid) == child.pid != os.getpgrp()


def test_only_named_descriptors_are_inherited(tmp_path: Path):
    with (tmp_path / "a").open("w") as a, (tmp_path / "b").open("w") as b:
        os.set_inheritable(a.fileno(), 1)
        os.set_inheritable(b.fileno(), 1)
        with process.spawn(["sh", "-c", "ls -l /proc/$$/fd"], pipe=True, pass_fds=[b.fileno()]) as child:
            seen = child.stdout.read().decode()
    assert f"{tmp_path}/b" in seen
    assert f"{tmp_path}/a" not in seen


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_child_dies_with_us_after_sigkill():
    text = (
        "import sys, time; from vmtasks.host import process as proc\n"
        "with proc.spawn(['sleep', '60'], die_with_us=True) as child: print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as parent:
        sleeper = int(parent.stdout.readline())
        assert processes.started(sleeper)
        parent.kill()
    assert gone(sleeper)


def test_a_detached_process_outlives_us(tmp_path: Path):
    text = f"""
from pathlib import Path
from vmtasks.host import process as proc
with Path({str(tmp_path / "out")!r}).open("wb") as out:
    print(proc.detach(["sh", "-c", "echo said; exec sleep 60"], out).pid)
"""
    pid = int(subprocess.run([sys.executable, "-W", "ignore", "-c", text], stdout=subprocess.PIPE, check=True).stdout)
    assert processes.started(pid)
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert (tmp_path / "out").read_text() == "said\n"


# ---- which process is it


def test_a_process_is_known_by_its_start():
    with process.spawn(["sh", "-c", "echo; exec sleep 60"], pipe=True) as child:
        child.stdout.readline()
        time.sleep(0.1)
        first = processes.started(child.pid)
        assert first == processes.started(child.pid) != ""
        assert processes.command_line(child.pid) == "sleep 60 "
    assert processes.started(child.pid) == ""
    assert processes.command_line(child.pid) == ""


def test_a_zombie_is_gone():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.started(child.pid) == ""
    child.wait()


def test_a_process_with_an_odd_name_is_known(tmp_path: Path):
    odd = tmp_path / ") Z 1 ("
    odd.symlink_to(process.find("sleep"))
    with process.spawn([odd, "60"]) as child:
        assert processes.started(child.pid).isdecimal()
        assert int(processes.started(child.pid)) > 100


def test_a_signal_while_a_child_starts_leaves_no_child(tmp_path: Path):
    """Whenever it comes: as soon as the child runs, which is before Popen has returned, or a little later."""
    code = (
        "import sys\nfrom vmtasks.host import process as proc\n"
        "with proc.spawn(['sh', '-c', f'echo $$ >{sys.argv[1]}; kill -INT $PPID; exec sleep 60']) as child:\n"
        "    child.wait()\n"
    )
    for number in range(10):
        pid = tmp_path / str(number)
        ended = subprocess.run([sys.executable, "-c", code, pid], capture_output=True, check=False, timeout=60)
        assert b"KeyboardInterrupt" in ended.stderr
        assert not processes.started(int(pid.read_text()))
