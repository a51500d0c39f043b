"""Actions that run the user's code in the machine."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from doit.exceptions import TaskFailed

from vmtasks import printable
from vmtasks.host import progress
from vmtasks.suites.junit import gotest
from vmtasks.suites.results import Results, describe
from vmtasks.suites.run import Suites
from vmtasks.tasks.context import CONFIG


def sync() -> None:
    """Sync the source tree and print what was sent."""
    progress.say(f"sync {CONFIG.sync.source}: {Suites(Results(CONFIG)).sync()}")


def build() -> None:
    """Run the build command with live output."""
    with _live_output() as sink:
        Suites(Results(CONFIG)).build(sink)


def run_suite(results: Results, name: str, /) -> TaskFailed | None:
    """Run a suite with live output."""
    suite = CONFIG.suites[name]
    with _live_output() as sink:
        record = Suites(results).run(name, go_test_output(sink) if suite.format == "go-json" else sink)
    if record.status != 0:
        log = results.folder / name / "output.log"
        how = f"ended at its deadline of {suite.timeout_s} s" if record.timed_out else f"status {record.status}"
        why = f": {record.trouble}" if record.trouble else ""
        return TaskFailed(f"{describe(record)} ({how}){why}\nlog: {log}\nhint: doit ssh; {results.xml(name)}")
    progress.say(f"test:{name}: {describe(record)}")
    return None


@contextlib.contextmanager
def _live_output() -> Iterator[Callable[[bytes], None]]:
    """A sink that prints the guest's output as it comes, without control sequences. Colours end with the block."""
    live = printable.Live()

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        yield lambda data: show(live.feed(data))
    finally:
        show(live.end())


def go_test_output(sink: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """A sink for `go test -json` that passes on the text of each event, as `go test -v` prints it, line by line."""
    rest = b""

    def take(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            event = gotest.event(line.decode(errors="replace"))
            sink(line + b"\n" if event is None else str(event.get("Output", "")).encode(errors="replace"))

    return take
