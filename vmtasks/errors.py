"""The exception tree: every failure that is not a bug in vmtasks.

VmTasksError
├── ConfigError        the user's input is wrong: exit status 2, nothing was done
├── MissingToolError   a program that must be installed is not
├── FetchError         a download or a set of packages could not be fetched, or is not what was promised
├── CommandError       a helper program failed
├── ImageError         an image or ISO is damaged, or could not be made
├── PhaseError         a guest did not finish its phase; `cause` says which of the ways
├── MachineError       QEMU did not start, stop or answer
├── BindError          a folder of this host cannot be had in a guest that is well
├── SshError           the guest could not be reached, or a command in it did not end
│   ├── ConnectRefusedError    nothing listens on the port
│   ├── BannerError            the port is open, but no SSH server shows itself behind it
│   ├── HostKeyError           the server is not the one whose keys the image recorded
│   ├── AuthFailedError        the server does not take our key
│   ├── ConnectTimeoutError    the deadline passed at another stage
│   ├── ConnectionLostError    the connection broke: how the command ended is not known
│   ├── RebootedError          the guest has booted anew: the command was ended by that
│   └── CommandTimeoutError    the command's own deadline passed, overall or without output
├── WrongStatusError   a command in a guest, or a wait for something there, ended otherwise than was asked for
└── StateError         what is on disk does not allow what was asked (a missing snapshot, a damaged record)
    └── BusyError      another command is at work on the same thing
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from vmtasks import printable


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
        """Message, notes, the console's last lines, log and hint, each on lines of its own: what a front end prints.

        Whoever is quoted there, a guest say, no terminal obeys it.
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
        """A copy with other values, `hint` or `log` say, to raise `from` this one: an error that was raised stays.

        AttributeError for a value that this kind of error does not have.
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
    """Media could not be fetched, or is not what its digest promises."""


class CommandError(VmTasksError):
    """A helper program exited with a status other than 0, or not in time."""

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
        """`status` as the shell would see it: 128 + N after signal N. `timed_out`: the command was ended by us."""
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
    """QEMU did not start, stop or answer as it must."""


class BindError(VmTasksError):
    """A folder of this host cannot be had in the guest, which is well otherwise."""


class SshError(VmTasksError):
    """A guest could not be reached, or a command in it did not end as it must."""


class WrongStatusError(VmTasksError, AssertionError):
    """A command in a guest, or a wait for something there, ended otherwise than was asked for: a test fails by it."""

    def __init__(self, message: str, *, result: Any = None) -> None:
        """`result` is the CommandResult, where one command was the reason."""
        super().__init__(message)
        self.result = result


class ConnectRefusedError(SshError):
    """Nothing listens on the machine's port."""


class BannerError(SshError):
    """The port accepts connections, but no SSH server shows itself: QEMU accepts whatever the guest does."""


class HostKeyError(SshError):
    """The server shows another host key than those that are pinned. Nothing was sent to it."""


class AuthFailedError(SshError):
    """The server does not take our key, or the key cannot be used."""


class ConnectTimeoutError(SshError):
    """The deadline passed before the login was complete."""


class ConnectionLostError(SshError):
    """The connection broke. How the command ended is not known, unless it was not started; nothing is run again."""

    def __init__(
        self, message: str, *, started: bool = True, stdout: bytes = b"", stderr: bytes = b"", hint: str = ""
    ) -> None:
        """`started` False: the command was never sent. `stdout` and `stderr`: what had come, as far as it was kept."""
        super().__init__(message, hint=hint)
        self.started = started
        self.explained = False
        self.stdout = stdout
        self.stderr = stderr


class RebootedError(SshError):
    """The guest has booted anew since the command was started, which ended it."""


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
        """`which` deadline; `stdout` and `stderr` are what had come until then, as far as it was kept."""
        super().__init__(message, hint=hint)
        self.which = which
        self.stdout = stdout
        self.stderr = stderr


class StateError(VmTasksError):
    """What is on disk does not allow what was asked."""


class BusyError(StateError):
    """Another command holds the lock, and did not let go of it in time."""


@contextmanager
def finally_do(undo: Callable[[], object], what: str) -> Iterator[None]:
    """Call `undo` at the end of the block, whichever way it ends.

    When the block fails, its error is the one that is raised; a failure of `undo` becomes a note on it that begins with
    `what`. When the block succeeds, a failure of `undo` is raised.
    """
    try:
        yield
    except BaseException as error:
        note_failure(error, undo, what)
        raise
    undo()


def note_failure(error: BaseException, undo: Callable[[], object], what: str) -> None:
    """Call `undo` while `error` is handled; its own failure becomes a note on `error` that begins with `what`."""
    try:
        undo()
    except Exception as second:  # noqa: BLE001 - whatever it is, the first error is the one that counts
        error.add_note(f"{what}: {second}")


FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = {
    errno.EEXIST: "a folder belongs there: move that file away",
    errno.EISDIR: "a file belongs there: move that folder away",
    errno.ELOOP: "a file belongs there, not a link: remove the link",
    errno.ENOTDIR: "a folder belongs there: move that file away",
    errno.ENXIO: "a file belongs there: move what is there away",
}
"""What lies where a file or folder of ours should be, and the remedy."""
OF_THE_HOST = (
    *FULL,
    *FORBIDDEN,
    *IN_THE_WAY,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
)
"""What a full, broken, read-only or oddly built file system gives, and a host that has run out of something."""


def os_failure(error: OSError) -> str:
    """What to tell a user of an error that this host's state explains; '' for any other, which is a bug."""
    if error.errno not in OF_THE_HOST:
        return ""
    path = error.filename2 or error.filename  # of a rename, the name that a user knows
    where = f"{path}: " if path else ""
    text = f"{where}{error.strerror}"
    if error.errno in FULL:
        where = "put the store elsewhere with VMTASKS_STORE=/path (or store=), the state folder with VM_DIR=/path"
        return f"{text}\nhint: free some space, or {where}"
    if error.errno in FORBIDDEN:
        return f"{text}\nhint: choose folders that you may write with VMTASKS_STORE=/path and VM_DIR=/path"
    if path and error.errno in IN_THE_WAY:
        return f"{text}\nhint: {IN_THE_WAY[error.errno]}"
    return text
