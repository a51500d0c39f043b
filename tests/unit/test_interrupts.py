"""Signals that ask us to end, and a terminal that goes, at the worst moments: each in a process of its own."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

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
from vmtasks.interrupts import unwind_on_signals
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
from vmtasks.interrupts import unwind_on_signals
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
from vmtasks.interrupts import unwind_on_signals
unwind_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
"""
LIVE = """
import sys, time
from pathlib import Path
from vmtasks import progress
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


def run(code: str, *words: str) -> str:
    """What a Python program prints; it must end well."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_is_finished_first(tmp_path: Path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "__init__.py").write_text(VICTIM)
    (tmp_path / "victim" / "part.py").write_text("whole = True")
    assert run(IMPORTS, str(tmp_path)) == f"True SIGTERM [{signal.SIGTERM:d}]"


def test_nothing_interrupts_what_the_first_one_began():
    assert run(TWICE) == "SIGHUP"


def test_what_is_ignored_stays_so():
    assert run(NOHUP) == "goes on"


def test_a_live_line_outlives_its_terminal(tmp_path: Path):
    """The kernel's SIGHUP is another matter: this one has no controlling terminal."""
    mark = tmp_path / "mark"
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", LIVE, str(mark)], env={**os.environ, "TERM": "xterm"}, stdin=subprocess.DEVNULL,
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
