"""How much longer is a run with nothing to do than a bare doit with one task? Prints both medians and their ratio.

    python benchmarks/noop.py [--rounds N] [guest=tiny ...]

The project must be up to date: `./doit guest=tiny auto_install quick` first.
Both sides are whole processes, started in turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.5
BARE = 'def task_one():\n    return {"actions": ["true"], "targets": ["made"], "uptodate": [True]}\n'
DOIT = str(Path(sys.executable).with_name("doit"))


def run(words: list[str], folder: Path) -> tuple[float, str]:
    """Seconds that a command took, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def main() -> int:
    """Exit status 1 when the ratio is above the limit, 2 when the project is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "variables", nargs="*", default=["guest=tiny"], help="as doit takes them: guest=tiny store=/path"
    )
    given = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    ours = [DOIT, *given.variables, "auto_install", "quick"]
    wrapped = [str(project / "doit"), *ours[1:]]
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder)
        (bare / "dodo.py").write_text(BARE)
        (bare / "made").touch()
        _, said = run(ours, project)
        if any(not line.startswith("✓") for line in said.splitlines()):
            sys.stderr.write(f"not up to date:\n{said}")
            return 2
        times: dict[str, list[float]] = {"bare doit": [], "doit, nothing to do": [], "./doit, nothing to do": []}
        for _ in range(given.rounds):
            for name, (words, place) in zip(times, (([DOIT], bare), (ours, project), (wrapped, project)), strict=True):
                times[name].append(run(words, place)[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:24} {median * 1000:6.1f} ms  {median / medians['bare doit']:.2f} times bare doit")
    ratio = medians["./doit, nothing to do"] / medians["bare doit"]
    print(f"ratio {ratio:.2f}, limit {LIMIT}: {'ok' if ratio <= LIMIT else 'too slow'}")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
