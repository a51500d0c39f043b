"""The exception tree: every failure that is not a bug in vmtasks.

VmTasksError
├── ConfigError        the user's input is wrong: exit status 2, nothing was done
├── MissingToolError   a program that must be installed is not
├── FetchError         a download or a set of packages could not be had, or is not what was promised
├── CommandError       a helper program failed
├── ImageError         an image or ISO is damaged, or could not be made
├── PhaseError         a guest did not finish its phase; `cause` says which of the ways
├── MachineError       QEMU did not start, stop or answer
├── SshError           the guest could not be reached, or a command in it did not end
└── StateError         what is on disk does not allow what was asked (a lock, a missing snapshot)
"""

from collections.abc import Sequence
from pathlib import Path


class VmTasksError(Exception):
    """A failure with its cause, what to do about it, and the log that shows it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", log: Path | None = None, console: Sequence[str] = ()) -> None:
        """`message` is one sentence; `hint` names the next step; `log` exists; `console`: what it last said."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log
        self.console = tuple(console)

    def __str__(self) -> str:
        """Message, the console's last lines, log and hint, each on lines of their own: what a front end prints."""
        lines = [self.message]
        if self.console:
            lines += ["last lines of the console:", *(f"  | {line}" for line in self.console)]
        if self.log is not None:
            lines.append(f"log: {self.log}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class ConfigError(VmTasksError):
    """vm.toml, guest.toml, a variable or an option is wrong."""

    exit_code = 2


class MissingToolError(VmTasksError):
    """A program is not installed; the hint holds the command that installs it."""


class FetchError(VmTasksError):
    """Media could not be had, or is not what its digest promises."""


class CommandError(VmTasksError):
    """A helper program exited with a status other than 0, or not in time."""

    def __init__(self, message: str, *, status: int, stderr: str = "", hint: str = "", log: Path | None = None) -> None:
        """`status` as the shell would see it: 128 + N after signal N, 124 after a timeout."""
        super().__init__(message, hint=hint, log=log)
        self.status = status
        self.stderr = stderr


class ImageError(VmTasksError):
    """A disk image or an ISO is damaged or could not be written."""


class PhaseError(VmTasksError):
    """A guest did not finish its phase."""

    def __init__(
        self, message: str, *, cause: str, hint: str = "", log: Path | None = None, console: Sequence[str] = ()
    ) -> None:
        """`cause` is one of vmtasks.phase.CAUSES."""
        super().__init__(message, hint=hint, log=log, console=console)
        self.cause = cause


class MachineError(VmTasksError):
    """QEMU did not start, stop or answer as it must."""


class SshError(VmTasksError):
    """A guest could not be reached, or a command in it did not end as it must."""


class StateError(VmTasksError):
    """What is on disk does not allow what was asked."""
