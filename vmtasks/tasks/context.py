"""What all tasks share: the project's configuration, errors turned into doit's failures, and signals."""

import atexit
import functools
import os
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec

from doit import cmd_base, doit_cmd

from vmtasks.config import rules
from vmtasks.config.load import Config, load
from vmtasks.errors import ConfigError, VmTasksError, os_failure
from vmtasks.host.progress import accept_any_text, open_streams, talk, tell_notes, to_stderr
from vmtasks.host.signals import unwind_on_signals

P = ParamSpec("P")


UNREAD = 141
"""As a program that SIGPIPE ended: whoever read our output has gone away."""

VARIABLES: dict[str, str] = getattr(doit_cmd, "_CMDLINE_VARS", None) or {}
"""What stands on doit's command line as name=value."""


def read_config() -> Config:
    """The configuration, or one line on stderr and exit status 2: nothing has been done yet."""
    try:
        config = load(Path.cwd(), VARIABLES)
        rules.check(config)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    return config


def action(function: Callable[P, Any]) -> Callable[P, Any]:
    """Make a doit action of `function`: what a user can mend becomes a failed task without a traceback."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        from doit.exceptions import TaskError, TaskFailed  # noqa: PLC0415

        try:
            return function(*args, **kwargs)
        except VmTasksError as error:
            kind = TaskError if error.exit_code == ConfigError.exit_code else TaskFailed
            return kind(str(error))
        except BrokenPipeError:
            os._exit(UNREAD)
        except OSError as error:
            if not (failure := os_failure(error)):
                raise
            return TaskFailed(failure)

    return wrapper


def asked_with(task: str, option: str) -> bool:
    """Whether this run was asked for `task` with `option`, `--name` or shorter, in doit's words.

    Only for what must be known when tasks are made: what a task depends on cannot follow from its options.
    """
    for name, word in pairwise(sys.argv[1:]):
        given = word.partition("=")[0]
        if name == task and (word.startswith(option[1:3]) or (len(given) > 2 and option.startswith(given))):
            return True
    return False


def quiet_when_unread() -> None:
    """Have `doit info ... | head` end as any program does whose output nobody reads: these leave nothing to undo."""
    if set(sys.argv[1:2]) & {"help", "info", "list"}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def interrupt_on_signals() -> None:
    """Turn the first signal that asks us to end into KeyboardInterrupt, and say so in one line."""

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Say in one line that we were interrupted; everything else is a bug and shows its traceback."""
        if issubclass(kind, KeyboardInterrupt):
            to_stderr(f"interrupted by {error}\n")
            tell_notes(error)
        elif issubclass(kind, BrokenPipeError):
            os._exit(UNREAD)
        else:
            sys.__excepthook__(kind, error, trace)

    def flush() -> None:
        """What is written only now may find nobody who reads it."""
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os._exit(UNREAD)

    sys.excepthook = leave
    atexit.register(flush)
    unwind_on_signals()


if sys.stdout is None:  # it was closed, and doit's commands have it as it was then
    cmd_base.DoitCmdBase.outstream = property(lambda _: sys.stdout, lambda _, __: None)
open_streams()
accept_any_text()
talk()
CONFIG = read_config()
"""Read once, when doit loads the dodo file: tasks are made from it."""
