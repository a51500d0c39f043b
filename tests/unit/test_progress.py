"""How long something took, as it is shown, and what becomes of a stream that nobody reads any more."""

import os
import subprocess
import sys

import pytest

from vmtasks.host.progress import seconds

GONE = """
import sys
from vmtasks.host import live, progress
progress.to_stderr("a line\\n")
live._Unbreakable(sys.stderr, progress.write_or_drop).write("no whole line, and nobody flushes it")
print("done")
"""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.04, "0.0 s"),
        (4, "4.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (7500, "2 h 5 min"),
        (100_000, "1 d 3 h"),
    ],
)
def test_a_time_is_shown_in_its_two_largest_units(value: float, shown: str):
    assert seconds(value) == shown


def test_a_program_whose_stderr_is_closed_goes_on_and_ends_well():
    read, write = os.pipe()
    os.close(read)
    # What is buffered nowhere is never left in a buffer.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", GONE]
    done = subprocess.run(words, env=env, stderr=write, stdout=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "done\n")
