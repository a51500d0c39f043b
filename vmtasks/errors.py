"""The exception tree: every failure that is not a bug in vmtasks.

VmTasksError
├── ConfigError        the user's input is wrong: exit status 2, nothing was done
├── MissingToolError   a program that must be installed is not
├── FetchError         a download or a set of packages could not be fetched, or has the wrong digest
├── CommandError       a helper program failed or timed out
├── ImageError         an image or ISO is damaged, or could not be written
├── PhaseError         a guest did not finish its phase; `cause` says why
├── MachineError       QEMU did not start, stop or answer
├── BindError          a folder of this host cannot be bound into a guest that works otherwise
├── SshError           the guest could not be reached, or a command in it did not finish
│   ├── ConnectRefusedError    nothing listens on the port
│   ├── BannerError            the port is open, but no SSH server answers
│   ├── HostKeyError           the server's host key is not one that the image recorded
│   ├── AuthFailedError        the server refuses our key
│   ├── ConnectTimeoutError    the login did not complete before the deadline
│   ├── ConnectionLostError    the connection broke: the command's exit status is unknown
│   ├── RebootedError          the guest rebooted, which ended the command
│   └── CommandTimeoutError    the command's deadline passed, overall or without output
├── WrongStatusError   a command in a guest, or a wait in it, ended otherwise than expected
└── StateError         the state on disk does not allow the request (a missing snapshot, a damaged record)
    └── BusyError      another command holds the lock
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from vmtasks import printable


class VmTasksError(Exception):
    """A failure with its cause, a hint, and the log that shows it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", log: Path | None = None, console: Sequence[str] = ()) -> None:
        """`message` is one sentence; `hint` names the next step; `log` exists; `console`: its last lines."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log
        self.console = tuple(console)

    def __str__(self) -> str:
        """Message, notes, last console lines, log and hint, each on its own line, as front ends print them.

        Control sequences, which quoted output of a guest may contain, are removed.
        """
        lines = [self.message, *(f"also: {note}" for note in getattr(self, "__notes__", ()))]
        if self.console:
            lines += ["last lines of the console:", *(f"  | {line}" for line in self.console)]
        if self.log is not None:
            lines.append(f"log: {self.log}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return printable.text("\n".join(lines))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields replaced, as `hint` or `log`, to raise `from` this one.

        AttributeError for a field that this class does not have.
        """
        if unknown := changes.keys() - self.__dict__.keys():
            raise AttributeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        copy = type(self).__new__(type(self))
        copy.args = (changes.get("message", self.message),)
        copy.__dict__.update(self.__dict__, **changes)
        if notes := getattr(self, "__notes__", ()):
            copy.__notes__ = list(notes)
        return copy


class ConfigError(VmTasksError):
    """vm.toml, guest.toml, a variable or an option is wrong."""

    exit_code = 2


class MissingToolError(VmTasksError):
    """A program is not installed; the hint holds the command that installs it."""


class FetchError(VmTasksError):
    """Media could not be fetched, or has the wrong digest."""


class CommandError(VmTasksError):
    """A helper program exited with a status other than 0, or timed out."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        stderr: str = "",
        timed_out: bool = False,
        hint: str = "",
        log: Path | None = None,
    ) -> None:
        """`status` is 128 + N after signal N, as in the shell. `timed_out`: we ended the command."""
        super().__init__(message, hint=hint, log=log)
        self.status = status
        self.stderr = stderr
        self.timed_out = timed_out


class ImageError(VmTasksError):
    """A disk image or an ISO is damaged or could not be written."""


class PhaseError(VmTasksError):
    """A guest did not finish its phase."""

    def __init__(
        self, message: str, *, cause: str, hint: str = "", log: Path | None = None, console: Sequence[str] = ()
    ) -> None:
        """`cause` is one of vmtasks.images.judge.CAUSES."""
        super().__init__(message, hint=hint, log=log, console=console)
        self.cause = cause


class MachineError(VmTasksError):
    """QEMU did not start, stop or answer."""


class BindError(VmTasksError):
    """A folder of this host cannot be bound into the guest, which works otherwise."""


class SshError(VmTasksError):
    """A guest could not be reached, or a command in it did not finish."""


class WrongStatusError(VmTasksError, AssertionError):
    """A command in a guest, or a wait in it, ended otherwise than expected. An AssertionError, so that tests fail."""

    def __init__(self, message: str, *, result: Any = None) -> None:
        """`result` is the CommandResult, if one command was the cause."""
        super().__init__(message)
        self.result = result


class ConnectRefusedError(SshError):
    """Nothing listens on the machine's port."""


class BannerError(SshError):
    """The port accepts connections, as QEMU always does, but no SSH server in the guest answers."""


class HostKeyError(SshError):
    """The server's host key is not one of the pinned keys. Nothing was sent to it."""


class AuthFailedError(SshError):
    """The server refuses our key, or the key cannot be used."""


class ConnectTimeoutError(SshError):
    """The login did not complete before the deadline."""


class ConnectionLostError(SshError):
    """The connection broke. The command's exit status is unknown, unless it was not started; it is not run again."""

    def __init__(
        self, message: str, *, started: bool = True, stdout: bytes = b"", stderr: bytes = b"", hint: str = ""
    ) -> None:
        """`started` False: the command was never sent. `stdout` and `stderr`: the output so far, if it was kept."""
        super().__init__(message, hint=hint)
        self.started = started
        self.explained = False
        self.stdout = stdout
        self.stderr = stderr


class RebootedError(SshError):
    """The guest has rebooted since the command started, which ended it."""


class CommandTimeoutError(SshError):
    """A command passed a deadline and was ended."""

    def __init__(
        self,
        message: str,
        *,
        which: Literal["overall", "idle"],
        stdout: bytes = b"",
        stderr: bytes = b"",
        hint: str = "",
    ) -> None:
        """`which` deadline; `stdout` and `stderr`: the output so far, if it was kept."""
        super().__init__(message, hint=hint)
        self.which = which
        self.stdout = stdout
        self.stderr = stderr


class StateError(VmTasksError):
    """The state on disk does not allow the request."""


class BusyError(StateError):
    """Another command holds the lock and did not release it in time."""


@contextmanager
def finally_do(undo: Callable[[], object], what: str) -> Iterator[None]:
    """Call `undo` at the end of the block, also when the block fails.

    If both fail, raises the block's error with a note about `undo` that begins with `what`.
    """
    try:
        yield
    except BaseException as error:
        note_failure(error, undo, what)
        raise
    undo()


def note_failure(error: BaseException, undo: Callable[[], object], what: str) -> None:
    """Call `undo` while `error` is handled; if that fails, add a note to `error` that begins with `what`."""
    try:
        undo()
    except Exception as second:  # noqa: BLE001 - the first error is the one to raise
        error.add_note(f"{what}: {second}")


FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_TYPE = {
    errno.EEXIST: "a folder belongs there: move that file away",
    errno.EISDIR: "a file belongs there: move that folder away",
    errno.ELOOP: "a file belongs there, not a link: remove the link",
    errno.ENOTDIR: "a folder belongs there: move that file away",
    errno.ENXIO: "a file belongs there: move what is there away",
}
"""Errors of a path that has another type than it should, with the remedy."""
HOST_ERRNOS = (
    *FULL,
    *FORBIDDEN,
    *WRONG_TYPE,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
)
"""Errors that the state of the host explains: its file systems, or exhausted resources."""


def os_failure(error: OSError) -> str:
    """The message for an error that the host's state explains; '' for any other, which is a bug."""
    if error.errno not in HOST_ERRNOS:
        return ""
    path = error.filename2 or error.filename  # the target of a rename: the name that a user knows
    where = f"{path}: " if path else ""
    text = f"{where}{error.strerror}"
    if error.errno in FULL:
        where = "put the store elsewhere with VMTASKS_STORE=/path (or store=), the state folder with VM_DIR=/path"
        return f"{text}\nhint: free some space, or {where}"
    if error.errno in FORBIDDEN:
        return f"{text}\nhint: choose folders that you can write to with VMTASKS_STORE=/path and VM_DIR=/path"
    if path and error.errno in WRONG_TYPE:
        return f"{text}\nhint: {WRONG_TYPE[error.errno]}"
    return text
