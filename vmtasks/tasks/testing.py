"""Tasks that run the user's code in the machine: sync, build, test:<suite>, test_all, quick."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from vmtasks.host import progress
from vmtasks.suites.results import Results, describe
from vmtasks.tasks.context import CONFIG, action
from vmtasks.tasks.images import UpToDate
from vmtasks.tasks.machines import images_needed
from vmtasks.tasks.reporter import LazyText

Task = dict[str, Any]


def task_sync() -> Task:
    """Sync the source tree into the machine.

    rsync sends what has changed and deletes what the source no longer has. Patterns of `sync.exclude` that begin with /
    are anchored at the source. Starts the machine if needed.

    Exit status: 0 the trees are equal; 1 no connection to the guest, or it could not write; 2 wrong configuration.
    Example: doit sync
    """
    return {"actions": [action("vmtasks.tasks.actions.testing:sync")], "task_dep": ["start"], "io": {"capture": False}}


def task_build() -> Task:
    """Run the build command in the machine.

    Runs `build.command` in the folder `sync.dest` after each sync, with live output.

    Exit status: 0 built, or there is no command; 1 it failed or took too long.
    Example: doit build
    """
    return {
        "actions": [action("vmtasks.tasks.actions.testing:build")],
        "task_dep": ["sync"],
        "io": {"capture": False},
    }


def task_test() -> Iterator[Task]:
    """Run a suite in the machine, unless none of its inputs has changed since it passed.

    Its inputs are the tree, the machine's image, the suite and the build. Runs start, sync and build first. Output is
    live, and kept in `.vm/results/` with JUnit XML and artifacts.

    Exit status: 0 passed, now or before; 1 it failed or took too long; 2 wrong configuration.
    Example: doit -a test:unit     (-a: even if nothing has changed)
    """
    results, before = Results(CONFIG), "build"
    for name in in_order():
        suite = CONFIG.suites[name]
        # doit runs tasks that wait for the same task in no particular order. So each suite has a `_turn` task that
        # waits for the one before; as `setup`, so that a failed suite does not keep the others from running.
        yield {"basename": f"_turn_{name}", "actions": None, "setup": [before]}
        before = f"_turn_{name}"
        yield {
            "name": name,
            "doc": suite.command,
            "actions": [action("vmtasks.tasks.actions.testing:run_suite", results, name)],
            "uptodate": [UpToDate(partial(results.why_stale, name))],
            "task_dep": images_needed(),
            "setup": [before],
            "meta": {"fresh": LazyText(partial(_last, results, name))},
            "io": {"capture": False},
        }


def in_order() -> list[str]:
    """All suites in the order that they run: those of `quick` in its order, then the others in the file's."""
    return list(dict.fromkeys([*CONFIG.quick, *CONFIG.suites]))


def _last(results: Results, name: str) -> str:
    record = results.last(name)
    if record is None:
        return f"test:{name}"
    return (
        f"test:{name}: {describe(record)}, {progress.seconds(time.time() - record.finished)} ago; nothing has changed"
    )


def task_test_all() -> Task:
    """Run all suites.

    Skips those that are up to date. A failed suite does not keep the others from running.

    Exit status: 0 all passed; 1 one failed.
    Example: doit test_all
    """
    return {"actions": None, "task_dep": [f"test:{name}" for name in in_order()]}


def task_quick() -> Task:
    """Run the suites that [quick] names.

    `doit` alone does this: start the machine if needed, sync, build, run what is stale.

    Exit status: 0 all passed; 1 one failed.
    Example: doit quick
    """
    return {"actions": None, "task_dep": [f"test:{name}" for name in CONFIG.quick] or images_needed()}
