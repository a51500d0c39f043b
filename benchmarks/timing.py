"""What the benchmarks share: a bare doit to compare with, timed commands, and medians with the ratio of two of them."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TASK = 'def task_one():\n    return {"actions": ["true"], "targets": ["made"], "uptodate": [True]}\n'


def bare_doit(folder: Path, pyproject: Path | None = None) -> Path:
    """Make `folder` a project of doit's with one task, which is up to date.

    doit parses a `pyproject.toml` beside its dodo.py: the one that is compared with it has the same one.
    """
    if pyproject is not None:
        shutil.copy(pyproject, folder)
    (folder / "dodo.py").write_text(TASK)
    (folder / "made").touch()
    return folder


def run(words: Sequence[str], folder: Path) -> tuple[float, str]:
    """Seconds that a command took, and what it printed. Its modules are compiled once, as they are for users."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    done = subprocess.run(
        words, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - began
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return took, done.stdout


def compare(times: Mapping[str, Sequence[float]], limit: float) -> int:
    """Print the medians of all, and how many times the first's the last one's is; exit status 1 above the limit."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians))
    for name, median in medians.items():
        print(f"{name:26} {median * 1000:8.1f} ms  {median / medians[base]:.2f} times {base}")
    ratio = list(medians.values())[-1] / medians[base]
    print(f"ratio {ratio:.2f}, limit {limit}: {'ok' if ratio <= limit else 'too slow'}")
    return 0 if ratio <= limit else 1
