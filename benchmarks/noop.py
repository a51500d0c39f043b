"""How much longer is a run with nothing to do than a bare doit with one task? Prints both medians and their ratio.

    python benchmarks/noop.py [--rounds N] [guest=tiny ...]

The project must be up to date: `./doit guest=tiny auto_install quick` first.
Both sides are whole processes, started in turn.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from timing import bare_doit, compare, run

LIMIT = 1.6
DOIT = str(Path(sys.executable).with_name("doit"))


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
        bare = bare_doit(Path(folder), project / "pyproject.toml")
        _, said = run(ours, project)
        if any(not line.startswith("✓") for line in said.splitlines()):
            sys.stderr.write(f"not up to date:\n{said}")
            return 2
        times: dict[str, list[float]] = {"bare doit": [], "doit, nothing to do": [], "./doit, nothing to do": []}
        for _ in range(given.rounds):
            for name, (words, place) in zip(times, (([DOIT], bare), (ours, project), (wrapped, project)), strict=True):
                times[name].append(run(words, place)[0])
    return compare(times, LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
