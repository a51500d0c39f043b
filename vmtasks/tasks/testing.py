"""Tasks that run the user's code in the machine: sync, build, test:<suite>, test_all, quick."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from vmtasks import printable
from vmtasks.host import progress
from vmtasks.suites.results import Results, describe
from vmtasks.tasks.context import CONFIG, action
from vmtasks.tasks.images import Intact
from vmtasks.tasks.machines import images_needed
from vmtasks.tasks.reporter import Said

Task = dict[str, Any]


if TYPE_CHECKING:
    from vmtasks.suites.run import Suites


def suites(results: Results) -> "Suites":
    """The suites in their machine. Imported only when one is stale: most runs have nothing to do."""
    from vmtasks.suites.run import Suites  # noqa: PLC0415

    return Suites(results)


def _build() -> None:
    with _live() as sink:
        suites(Results(CONFIG)).build(sink)


@contextlib.contextmanager
def _live() -> Iterator[Callable[[bytes], None]]:
    """Shows what the guest prints, as it comes; its colours end with the block. Its log has every byte."""
    shown = printable.Live()

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        yield lambda data: show(shown.feed(data))
    finally:
        show(shown.end())


def _spoken(sink: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The sink for `go test -json`: passes on what the events say, as `-v` would show it, when a line is whole."""
    from vmtasks.suites.junit import gotest  # noqa: PLC0415

    rest = b""

    def take(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            event = gotest.event(line.decode(errors="replace"))
            sink(line + b"\n" if event is None else str(event.get("Output", "")).encode(errors="replace"))

    return take


def task_sync() -> Task:
    """Sync the source tree into the machine.

    With rsync: only what has changed is sent, and what is gone from the source goes from the guest. Patterns of
    `sync.exclude` that begin with / are anchored at the source. Starts the machine if need be.

    Exit status: 0 the trees are equal; 1 the guest was not reached, or could not write; 2 wrong configuration.
    Example: doit sync
    """

    def sync() -> None:
        progress.say(f"sync {CONFIG.sync.source}: {suites(Results(CONFIG)).sync()}")

    return {"actions": [action(sync)], "task_dep": ["start"], "io": {"capture": False}}


def task_build() -> Task:
    """Run the build command in the machine.

    `build.command`, in the folder `sync.dest`, after each sync. Its output is shown as it comes.

    Exit status: 0 built, or there is no command; 1 it failed or took too long.
    Example: doit build
    """
    return {
        "actions": [action(_build)],
        "task_dep": ["sync"],
        "io": {"capture": False},
    }


def task_test() -> Iterator[Task]:
    """Run a suite in the machine, unless nothing that decides its result has changed since it passed.

    What decides: the tree, the machine's system, the suite and the build. Brings start, sync and build with it. Output
    is live, and kept in `.vm/results/` with JUnit XML and artifacts.

    Exit status: 0 passed, now or before; 1 it failed or took too long; 2 wrong configuration.
    Example: doit -a test:unit     (-a: also if nothing has changed)
    """
    results, before = Results(CONFIG), "build"
    for name in in_order():
        suite = CONFIG.suites[name]
        # doit releases what waits for one task in no order, so each waits for a task of its own that follows the one
        # before. As a setup it does not keep the others from running where it fails.
        yield {"basename": f"_turn_{name}", "actions": None, "setup": [before]}
        before = f"_turn_{name}"
        yield {
            "name": name,
            "doc": suite.command,
            "actions": [action(partial(_run, results, name))],
            "uptodate": [Intact(partial(results.why_stale, name))],
            "task_dep": images_needed(),
            "setup": [before],
            "meta": {"fresh": Said(partial(_last, results, name))},
            "io": {"capture": False},
        }


def in_order() -> list[str]:
    """All suites as they run: those of `quick` as they stand there, then the others as they stand in the file."""
    return list(dict.fromkeys([*CONFIG.quick, *CONFIG.suites]))


def _run(results: Results, name: str) -> Any:
    from doit.exceptions import TaskFailed  # noqa: PLC0415

    spoken = CONFIG.suites[name].format == "go-json"
    with _live() as sink:
        record = suites(results).run(name, _spoken(sink) if spoken else sink)
    if record.status != 0:
        log, limit = results.folder / name / "output.log", CONFIG.suites[name].timeout_s
        how = f"ended at its deadline of {limit} s" if record.timed_out else f"status {record.status}"
        why = f": {record.trouble}" if record.trouble else ""
        return TaskFailed(f"{describe(record)} ({how}){why}\nlog: {log}\nhint: doit ssh; {results.xml(name)}")
    progress.say(f"test:{name}: {describe(record)}")
    return None


def _last(results: Results, name: str) -> str:
    record = results.last(name)
    if record is None:
        return f"test:{name}"
    return (
        f"test:{name}: {describe(record)}, {progress.seconds(time.time() - record.finished)} ago; nothing has changed"
    )


def task_test_all() -> Task:
    """Run all suites.

    Those whose result still stands are not run again. One that fails does not keep the others from running.

    Exit status: 0 all passed; 1 one failed.
    Example: doit test_all
    """
    return {"actions": None, "task_dep": [f"test:{name}" for name in in_order()]}


def task_quick() -> Task:
    """Run the suites that [quick] names.

    What `doit` alone does: start or find the machine, sync, build, run what is stale.

    Exit status: 0 all passed; 1 one failed.
    Example: doit quick
    """
    return {"actions": None, "task_dep": [f"test:{name}" for name in CONFIG.quick] or images_needed()}
