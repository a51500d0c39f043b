"""doit's output. Actions report what they do; this adds failures, and up-to-date tasks that have something to say."""

import os
from collections.abc import Callable
from typing import Any

from doit.exceptions import TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter

from vmtasks import printable


class LazyText:
    """A sentence that is made when it is printed, by the reporter or by `doit info`."""

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
    """One line for an up-to-date task that has `meta["fresh"]`, one block for a failure, nothing else."""

    desc = "vmtasks: quiet, with the last result of suites that need not run"

    def execute_task(self, task: Any) -> None:
        """Print nothing: the action does."""

    def skip_uptodate(self, task: Any) -> None:
        """Print the task's `fresh` text, if it has one."""
        fresh = task.meta.get("fresh") if task.meta else None
        if fresh is not None:
            self.write(f"{self._paint('32', '✓')} {printable.text(fresh())}\n")

    def add_failure(self, task: Any, fail: Any) -> None:
        """Print the failure, or one line for a task that was not run because of one."""
        if isinstance(fail, UnmetDependency):
            self.write(f"{self._paint('33', '-')} {task.name}: not run, because {fail.message} failed\n")
            return
        self.failures.append({"task": task, "exception": fail})
        first, _, rest = printable.text(fail.get_msg()).strip().partition("\n")
        self.write(f"{self._paint('31', '✗')} {task.name}: {first}\n")
        if rest:
            self.write("".join(f"  {line}\n" for line in rest.splitlines()))

    def complete_run(self) -> None:
        """Print doit's own errors; failures of tasks were printed before."""
        if self.runtime_errors:
            self.write("\n".join(self.runtime_errors) + "\n")
        elif self.failures and all(isinstance(failure["exception"], TaskFailed) for failure in self.failures):
            raise SystemExit(1)  # doit itself would exit with 2 once a dependent task was not run

    def _paint(self, color: str, text: str) -> str:
        terminal = getattr(self.outstream, "isatty", lambda: False)()
        return f"\x1b[{color}m{text}\x1b[0m" if terminal and not os.environ.get("NO_COLOR") else text
