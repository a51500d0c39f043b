"""What doit prints: little. Actions say themselves what they do; this adds what was left alone, and what failed."""

import os
from collections.abc import Callable
from typing import Any

from doit.exceptions import TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter

from vmtasks import printable


class Said:
    """What to say of a task that was left alone: made only when it is said, and readable in `doit info`."""

    def __init__(self, sentence: Callable[[], str]) -> None:
        """`sentence` is called each time."""
        self._sentence = sentence

    def __call__(self) -> str:
        """The sentence."""
        return self._sentence()

    def __repr__(self) -> str:
        """As `doit info` shows it."""
        return self._sentence()


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """Silent about steps that had nothing to say; failures in one block each, at the end of what they printed."""

    desc = "vmtasks: quiet, with the last result of suites that need not run"

    def execute_task(self, task: Any) -> None:
        """Nothing: the action speaks."""

    def skip_uptodate(self, task: Any) -> None:
        """A line where being up to date is news."""
        fresh = task.meta.get("fresh") if task.meta else None
        if fresh is not None:
            self.write(f"{self._paint('32', '✓')} {printable.text(fresh())}\n")

    def add_failure(self, task: Any, fail: Any) -> None:
        """The cause, once; what only depends on it, in one line."""
        if isinstance(fail, UnmetDependency):
            self.write(f"{self._paint('33', '-')} {task.name}: not run, because {fail.message} failed\n")
            return
        self.failures.append({"task": task, "exception": fail})
        first, _, rest = printable.text(fail.get_msg()).strip().partition("\n")
        self.write(f"{self._paint('31', '✗')} {task.name}: {first}\n")
        if rest:
            self.write("".join(f"  {line}\n" for line in rest.splitlines()))

    def complete_run(self) -> None:
        """Errors of doit itself; those of tasks were shown when they came."""
        if self.runtime_errors:
            self.write("\n".join(self.runtime_errors) + "\n")
        elif self.failures and all(isinstance(failure["exception"], TaskFailed) for failure in self.failures):
            raise SystemExit(1)  # doit makes it 2, an error, as soon as another task was not run because of it

    def _paint(self, color: str, text: str) -> str:
        terminal = getattr(self.outstream, "isatty", lambda: False)()
        return f"\x1b[{color}m{text}\x1b[0m" if terminal and not os.environ.get("NO_COLOR") else text
