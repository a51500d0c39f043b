"""How much longer than a bare doit takes a run with nothing to do that has a large tree and many suites.

    python benchmarks/tree.py [--rounds N] [--files N] [--suites N]

A project is made in a temporary folder: a tree of 50,000 files in a git repository, and 20 suites that have passed. Its
guest is tiny, whose images come from the store, or are made first. Prints the medians and their ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import bare_doit, compare, run

from vmtasks.config.load import load
from vmtasks.config.scaffold import scaffold
from vmtasks.store.records import write_record
from vmtasks.suites.results import ResultRecord, Results

LIMIT = 4.0
DOIT = [sys.executable, "-m", "doit"]
IN_A_FOLDER = 25


def grow(tree: Path, files: int) -> None:
    """Write the tree: sources, and what was built of every tenth of them, which `.gitignore` names."""
    tree.mkdir()
    (tree / ".gitignore").write_text("*.o\n*.a\n/out/\n*~\n.cache/\n")
    for number in range(files):
        folder = tree / f"part{number // IN_A_FOLDER // 40}" / f"module{number // IN_A_FOLDER % 40}"
        if number % IN_A_FOLDER == 0:
            folder.mkdir(parents=True, exist_ok=True)
        suffix = "o" if number % 10 == 9 else "c"
        (folder / f"file{number}.{suffix}").write_text(f"int value{number};\n")


def prepare(root: Path, files: int, suites: int) -> None:
    """Make the project, its images, and results that stand."""
    grow(root / "tree", files)
    scaffold(root, "tiny")
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "-C", root, "add", "tree"], check=True)
    names = [f"suite{number}" for number in range(suites)]
    tables = "".join(f'\n[suites.{name}]\ncommand = "make {name}"\n' for name in names)
    (root / "config/vm.toml").write_text(
        f'guest = "tiny"\n[sync]\nsource = "tree"\n{tables}\n[quick]\nsuites = {json.dumps(names)}\n'
    )
    run([*DOIT, "auto_install"], root)
    time.sleep(2.5)  # a file that was written just now is read again
    results = Results(load(root, {}, os.environ))
    results.folder.mkdir(exist_ok=True)
    for name in names:
        results.xml(name).touch()
        record = ResultRecord(key="", status=0, counts="1 passed", duration_s=1, finished=1, parts=results.parts(name))
        write_record(results.folder / f"{name}.toml", record)


def main() -> int:
    """Exit status 1 when the ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--suites", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare, root = Path(folder, "bare"), Path(folder, "project")
        bare.mkdir()
        root.mkdir()
        bare_doit(bare)
        prepare(root, given.files, given.suites)
        _, said = run([*DOIT, "quick"], root)
        assert said.count("nothing has changed") == given.suites, f"not up to date:\n{said}"
        times: dict[str, list[float]] = {"bare doit": [], "doit quick, nothing to do": []}
        for _ in range(given.rounds):
            times["bare doit"].append(run(DOIT, bare)[0])
            times["doit quick, nothing to do"].append(run([*DOIT, "quick"], root)[0])
    return compare(times, LIMIT)


if __name__ == "__main__":
    sys.exit(main())
