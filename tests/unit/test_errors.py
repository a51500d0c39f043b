"""Errors: what is raised first is what is told, with what failed afterwards as notes; what is a bug stays one."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import Guest

from conftest import mounted_tmpfs
from vmtasks.errors import (
    CommandError,
    ConnectionLostError,
    PhaseError,
    SshError,
    VmTasksError,
    finally_do,
    note_failure,
    os_failure,
)
from vmtasks.machines import MachineSpec, Project, first_start


def fail() -> None:
    raise OSError(errno.EBUSY, "Device or resource busy", "/there")


def test_an_error_that_was_raised_stays_as_it_was():
    first = CommandError("it failed", status=3, stderr="why", hint="mend it")
    first.add_note("and the clean-up too")
    copy = first.replace(log=Path("/log"), message="make failed")
    assert (first.message, first.log, first.args) == ("it failed", None, ("it failed",))
    assert type(copy) is CommandError
    assert (copy.status, copy.stderr, copy.hint, copy.log) == (3, "why", "mend it", Path("/log"))
    assert str(copy) == "make failed\nalso: and the clean-up too\nlog: /log\nhint: mend it"
    copy.add_note("another")
    assert first.__notes__ == ["and the clean-up too"]
    with pytest.raises(AttributeError, match="CommandError has no cause"):
        first.replace(cause="panic")


def test_what_a_lost_connection_left_goes_with_the_copy():
    lost = ConnectionLostError("lost", started=False, stdout=b"some").replace(message="lost; rebooted", explained=True)
    assert (lost.started, lost.stdout, lost.explained, str(lost)) == (False, b"some", True, "lost; rebooted")


def test_a_clean_up_that_fails_does_not_hide_why_the_block_failed():
    with pytest.raises(VmTasksError) as caught, finally_do(fail, "the disk could not be removed"):
        raise VmTasksError("the first")
    assert str(caught.value).splitlines() == [
        "the first",
        "also: the disk could not be removed: [Errno 16] Device or resource busy: '/there'",
    ]


def test_a_clean_up_that_fails_after_success_is_an_error():
    with pytest.raises(OSError, match="busy"), finally_do(fail, "the disk could not be removed"):
        pass


def test_an_interrupt_goes_on_through_a_clean_up_that_fails():
    with pytest.raises(KeyboardInterrupt) as caught, finally_do(fail, "the disk could not be removed"):
        raise KeyboardInterrupt("SIGTERM")
    assert "the disk could not be removed" in caught.value.__notes__[0]


def test_an_interrupt_within_a_clean_up_is_not_swallowed():
    def interrupted() -> None:
        raise KeyboardInterrupt("SIGINT")

    with pytest.raises(KeyboardInterrupt):
        note_failure(ValueError("first"), interrupted, "never")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "choose folders"),
        (errno.EROFS, "choose folders"),
        (errno.ENOTDIR, "Not a directory\nhint: a folder belongs there"),
        (errno.EEXIST, "File exists\nhint: a folder belongs there"),
        (errno.EISDIR, "Is a directory\nhint: a file belongs there"),
        (errno.ELOOP, "remove the link"),
        (errno.ENAMETOOLONG, "File name too long"),
        (errno.EIO, "/there: Input/output error"),
    ],
)
def test_what_the_host_lacks_is_told(number: int, says: str):
    assert says in os_failure(OSError(number, os.strerror(number), "/there"))


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOENT, errno.EPIPE, None])
def test_any_other_error_of_the_system_is_a_bug(number: int | None):
    error = OSError(number, os.strerror(number)) if number else OSError("of a library")
    assert os_failure(error) == ""


TASKS = """
from vmtasks.tasks.context import action

def full():
    with open("/dev/full", "wb", buffering=0) as device:
        device.write(b"some")

print(action("__main__:full")())
try:
    action("os:fstat", 987654)()
except OSError as bug:
    print("a bug:", bug.strerror)
"""


def test_tasks_show_bugs_and_tell_the_rest(tmp_path: Path):
    Guest(tmp_path)
    done = subprocess.run([sys.executable, "-c", TASKS], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "No space left on device\nhint: free some space" in done.stdout
    assert done.stdout.endswith("a bug: Bad file descriptor\n")


def test_a_disk_that_cannot_be_kept_is_a_note_on_why_the_phase_failed(tmp_path: Path):
    guest = Guest(tmp_path)
    guest.prepare(verdict="7 install")
    (guest.builder.store.root / "failed").write_text("in the way")
    with pytest.raises(PhaseError, match=r"its script exited with 7 at step 'install'") as caught:
        guest.builder.build(1)
    assert "also: the disk could not be kept: " in str(caught.value)
    assert caught.value.log == guest.builder.log(1)


def test_a_machine_that_cannot_be_removed_does_not_hide_why_it_did_not_start(tmp_path: Path):
    guest = Guest(tmp_path)
    toml = tmp_path / "phases/sector/guest.toml"
    toml.write_text(toml.read_text() + '[ssh]\nuser = "root"\nready_timeout_s = 1\n')
    guest.again()
    guest.prepare()
    guest.builder.build(1)
    guest.builder.build(2)
    guest.builder.snapshot()
    environ = {"HOME": str(tmp_path), "VMTASKS_STORE": str(tmp_path / "store"), "VM_ACCEL": "tcg"}
    machine = Project(tmp_path, environ).create(MachineSpec(name="m"))
    with mounted_tmpfs(machine.folder / "busy", "64k"), pytest.raises(SshError) as caught:
        first_start(machine)
    assert caught.value.message == "machine m ended while it was booting"
    assert f"also: machine m could not be removed: [Errno {errno.EBUSY}]" in str(caught.value)
