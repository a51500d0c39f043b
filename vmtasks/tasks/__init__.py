"""The doit tasks, which a project's dodo.py imports. They have no logic: they call images, machines and suites."""

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

from vmtasks.tasks import byhand, images, info, machines, testing, verifying, why
from vmtasks.tasks.context import interrupt_on_signals, quiet_when_unread
from vmtasks.tasks.places import database, prepare_folders
from vmtasks.tasks.reporter import Reporter

__all__ = ["DOIT_CONFIG", "task_vmtasks"]

PREFIX = "task_"


def task_vmtasks() -> Iterator[dict[str, Any]]:
    """Make all tasks of vmtasks.

    One creator for all, because doit tokenizes the source of each creator, which takes most of the time for twenty.
    """
    for module in (images, machines, byhand, testing, verifying, why):
        for name, creator in vars(module).items():
            if name.startswith(PREFIX):
                yield from _named(name.removeprefix(PREFIX), inspect.cleandoc(creator.__doc__ or ""), creator())


def _named(name: str, text: str, tasks: dict[str, Any] | Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Name the tasks of one creator as doit does. doit keeps the first line of `text`; info.py prints all of it."""
    for task in [tasks] if isinstance(tasks, dict) else chain([{"name": None}], tasks):
        yield {"basename": name, "doc": text, **task, "meta": {**task.get("meta", {}), info.TEXT: text}}


prepare_folders()
interrupt_on_signals()
quiet_when_unread()
info.install()

DOIT_CONFIG = {
    "backend": "sqlite3",
    "continue": True,  # a suite that fails does not keep the others from running
    "default_tasks": ["quick"],
    "dep_file": str(database()),
    "reporter": Reporter,
    "verbosity": 2,
}
