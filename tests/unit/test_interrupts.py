"""Signals that ask us to end, and a terminal that goes, at the worst moments: each in a process of its own."""

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

VICTIM = """
from .part import *
import os, signal
os.kill(os.getpid(), signal.SIGTERM)
for _ in range(1000):
    pass
whole = part.whole  # the import of a submodule has set its name here; the second time it would not, as in asyncio
"""
IMPORTS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from vmtasks.host.signals import unwind_on_signals
caught = unwind_on_signals()
try:
    import victim
    time.sleep(30)
except KeyboardInterrupt as error:
    import victim
    print(victim.whole, error, caught)
"""
TWICE = """
import os, signal
from vmtasks.host.signals import unwind_on_signals
unwind_on_signals()
try:
    os.kill(os.getpid(), signal.SIGHUP)
except KeyboardInterrupt as error:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print(error)
"""
NOHUP = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from vmtasks.host.signals import unwind_on_signals
unwind_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
"""
LIVE = """
import sys, time
from pathlib import Path
from vmtasks.host import progress
progress.talk_on_stderr()
with progress.step("work") as step:
    step.now("its terminal is there")
    Path(sys.argv[1]).touch()
    while Path(sys.argv[1]).exists():
        time.sleep(0.01)
    step.now("its terminal is gone")
    time.sleep(0.3)
Path(sys.argv[1]).write_text("done")
"""


LOOP = """
for n in 1 2 3; do
    echo turn $n; "$@"; echo status $?
done
echo after
"""
ENDLESS = """
import time
from vmtasks.cli.common import app, main
@app.command()
def endless():
    try:
        print("works", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up")
main(lambda: None)
"""
CLEAN_UP = """
import sys, time
from vmtasks.host.signals import cuttable, unwind_on_signals
unwind_on_signals()
try:
    print("works", flush=True)
    time.sleep(60)
finally:
    print("undoes", flush=True)
    began = time.monotonic()
    time.sleep(1)
    must = time.monotonic() - began
    try:
        with cuttable():
            print("copies", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        print(f"cut: {must >= 1}", flush=True)
"""


def run(code: str, *words: str, ends: int = 0) -> str:
    """What a Python program prints that ends well, or by the signal `ends`."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == -ends, done.stderr
    return done.stdout.strip()


def test_an_import_is_finished_first(tmp_path: Path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "__init__.py").write_text(VICTIM)
    (tmp_path / "victim" / "part.py").write_text("whole = True")
    assert run(IMPORTS, str(tmp_path), ends=signal.SIGTERM) == f"True SIGTERM [{signal.SIGTERM:d}]"


def test_nothing_interrupts_what_the_first_one_began():
    assert run(TWICE, ends=signal.SIGHUP) == "SIGHUP"


def read_until(master: int, word: bytes) -> bytes:
    """What a terminal shows, up to a word."""
    shown = b""
    while word not in shown:
        ready, _, _ = select.select([master], [], [], 30)
        assert ready, shown
        shown += os.read(master, 1 << 16)
    return shown


def rest(master: int) -> bytes:
    """What it shows until nobody holds it any more."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO
        while data := os.read(master, 1 << 16):
            shown += data
    return shown


@pytest.mark.parametrize("shell", [name for name in ("bash", "dash") if shutil.which(name)])
def test_ctrl_c_ends_a_loop_of_a_shell(shell: str):
    """A shell goes on after a command that makes a status of its own of SIGINT."""
    pid, master = pty.fork()
    if pid == 0:
        os.execvp(shell, [shell, "-c", LOOP, shell, sys.executable, "-c", ENDLESS, "endless"])  # noqa: S606
    read_until(master, b"works")
    os.write(master, b"\x03")
    shown = rest(master)
    _, status = os.waitpid(pid, 0)
    os.close(master)
    assert b"cleaned up" in shown
    assert b"turn 2" not in shown
    assert b"after" not in shown
    assert os.waitstatus_to_exitcode(status) in (-signal.SIGINT, 128 + signal.SIGINT)


@pytest.mark.parametrize("before", [False, True], ids=["within", "before"])
def test_a_second_signal_cuts_short_what_may_be(*, before: bool):
    with subprocess.Popen([sys.executable, "-c", CLEAN_UP], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "works\n"
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGTERM)  # as timeout(1) does
        assert child.stdout.readline() == "undoes\n"
        if before:
            time.sleep(0.5)
        else:
            assert child.stdout.readline() == "copies\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "cut: True\n"
        assert child.wait(20) == -signal.SIGTERM


def test_what_is_ignored_stays_so():
    assert run(NOHUP) == "goes on"


def test_a_live_line_outlives_its_terminal(tmp_path: Path):
    """The kernel's SIGHUP is another matter: this one has no controlling terminal."""
    mark = tmp_path / "mark"
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", LIVE, str(mark)],
        env={**os.environ, "TERM": "xterm", "PYTHONUNBUFFERED": ""},
        stdin=subprocess.DEVNULL,
        stderr=slave,
    ) as child:  # fmt: skip
        try:
            os.close(slave)
            shown = b""
            while b"work" not in shown or not mark.exists():
                shown += os.read(master, 1 << 16)
            os.close(master)
            mark.unlink()
            assert child.wait(30) == 0
        finally:
            child.kill()
    assert mark.read_text() == "done"
