"""What all tasks share: the configuration, lazily imported actions, errors as doit failures, and signals."""

import atexit
import importlib
import os
import signal
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from doit import cmd_base, doit_cmd
from doit.exceptions import TaskError, TaskFailed

from vmtasks.config import rules
from vmtasks.config.load import Config, load
from vmtasks.errors import ConfigError, VmTasksError, os_failure
from vmtasks.host.progress import accept_any_text, open_streams, talk, tell_notes, to_stderr
from vmtasks.host.signals import unwind_on_signals

UNREAD = 141
"""Exit status 128 + SIGPIPE: the reader of our output has closed it."""

VARIABLES: dict[str, str] = getattr(doit_cmd, "_CMDLINE_VARS", None) or {}
"""The name=value arguments of doit's command line."""


def read_config() -> Config:
    """Read the configuration; print one line and exit with status 2 if it is invalid."""
    try:
        config = load(Path.cwd(), VARIABLES)
        rules.check(config)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    return config


def action(target: str, /, *arguments: Any) -> partial[Any]:
    """A doit action: call `target`, given as "module:function", with `arguments` and the task's options.

    The module is imported when the action runs. A failure that the user can fix becomes a failed task without a
    traceback.
    """
    return partial(_run, target, *arguments)


def _run(target: str, /, *arguments: Any, **options: Any) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(*arguments, **options)
    except VmTasksError as error:
        kind = TaskError if error.exit_code == ConfigError.exit_code else TaskFailed
        return kind(str(error))
    except BrokenPipeError:
        os._exit(UNREAD)
    except OSError as error:
        if not (failure := os_failure(error)):
            raise
        return TaskFailed(failure)


def option_given(task: str, option: str) -> bool:
    """Whether the command line gives `task` the long `option`, in any form that doit accepts.

    For task_dep only: doit parses a task's options after its dependencies are fixed.
    """
    for name, word in pairwise(sys.argv[1:]):
        given = word.partition("=")[0]
        if name == task and (word.startswith(option[1:3]) or (len(given) > 2 and option.startswith(given))):
            return True
    return False


def quiet_when_unread() -> None:
    """Let SIGPIPE end `doit info ... | head`. These commands have nothing to clean up."""
    if set(sys.argv[1:2]) & {"help", "info", "list"}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def interrupt_on_signals() -> None:
    """Turn the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt, reported in one line."""

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Report an interrupt in one line. Any other exception is a bug and shows its traceback."""
        if issubclass(kind, KeyboardInterrupt):
            to_stderr(f"interrupted by {error}\n")
            tell_notes(error)
        elif issubclass(kind, BrokenPipeError):
            os._exit(UNREAD)
        else:
            sys.__excepthook__(kind, error, trace)

    def flush() -> None:
        """Flush before Python does, which would print a traceback for a closed pipe."""
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os._exit(UNREAD)

    sys.excepthook = leave
    atexit.register(flush)
    unwind_on_signals()


if sys.stdout is None:  # closed; doit's commands took their stream at import
    cmd_base.DoitCmdBase.outstream = property(lambda _: sys.stdout, lambda _, __: None)
open_streams()
accept_any_text()
talk()
CONFIG = read_config()
"""Read once, when doit loads dodo.py."""
