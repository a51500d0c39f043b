"""The `vmtasks` command: machines in daily use, from the images that a project's tasks build. Owns typer."""

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from vmtasks.cli import common

MODULES = {
    "files": ["cp"],
    "jobs": ["attach", "cancel", "jobs"],
    "keys": ["keys"],
    "life": ["pause", "ps", "restart", "resume", "rm", "start", "stop", "wait"],
    "login": ["console", "exec", "forward", "ssh", "ssh-config"],
    "look": ["doctor", "inspect", "logs", "port"],
    "project": ["init", "prune", "schema"],
    "run": ["run"],
    "snapshots": ["restore", "snapshot", "snapshots"],
}
"""The verbs of each module. Only the module of the verb that is called is loaded."""

PANELS = ("Machines", "Use", "Jobs", "Look", "Snapshots", "Projects")
"""Panels of `vmtasks --help`, in order."""


def main() -> None:
    """Run the command line of this process."""
    common.main(lambda: load([] if "_VMTASKS_COMPLETE" in os.environ else sys.argv[1:]))


def load(words: Iterable[str]) -> None:
    """Load the module of the verb in the command line `words`; all modules when it has no known verb."""
    verb = _verb(iter(words))
    for module in [name for name, verbs in MODULES.items() if verb in verbs] or MODULES:
        importlib.import_module(f"vmtasks.cli.{module}")
    common.app.registered_commands.sort(
        key=lambda command: (PANELS.index(str(command.rich_help_panel)), _name(command) != "run")
    )


def _verb(words: Iterator[str]) -> str:
    """The first word that is neither a global option nor the value of one."""
    for word in words:
        if word == "-C":
            next(words, "")
        elif word not in ("-v", "--verbose") and not word.startswith("-C"):
            return word
    return ""


def _name(command: Any) -> str:
    return str(command.name or command.callback.__name__)


def __getattr__(name: str) -> Any:
    """Load `app`, the application with all verbs, when it is first used."""
    if name != "app":
        raise AttributeError(name)
    load([])
    return common.app
