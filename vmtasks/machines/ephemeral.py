"""A machine that lives as long as a block of code: gone on every way out, and reaped if even that was cut short."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from vmtasks.errors import VmTasksError, finally_do, note_failure
from vmtasks.host import progress
from vmtasks.host.progress import Say
from vmtasks.machines.machine import Machine
from vmtasks.machines.project import Project, Wants


@contextlib.contextmanager
def ephemeral(
    project: Project, wants: Wants | None = None, *, keep: bool = False, note: Say = progress.say
) -> Iterator[Machine]:
    """A running machine of its own for the length of the block.

    However the block ends, the machine is then stopped and removed with its disk and key, unless `keep`. If this
    process is killed, the kernel ends QEMU with it (where the main thread has started it), and Project.reap() of the
    next command removes the rest. Raises what Project.create() and Machine.start() raise; the console's log of a boot
    that failed is kept as `failed-boot.log` in the state folder.
    """
    machine = project.create(wants or Wants(), owner=0 if keep else os.getpid())
    # The kernel would end it with the thread, not with the process.
    main = threading.current_thread() is threading.main_thread()
    first_start(machine, note, die_with_us=main and not keep, keep=keep)
    if keep:
        yield machine
        return
    with finally_do(lambda: machine.destroy(lambda _: None), f"machine {machine.name} could not be removed"):
        yield machine


def first_start(machine: Machine, note: Say = progress.say, *, die_with_us: bool = False, keep: bool = False) -> None:
    """Start a machine that was just made; one that does not come up is removed, unless `keep`.

    Raises what Machine.start() raises.
    """
    try:
        machine.start(note, die_with_us=die_with_us)
    except BaseException as error:
        log = _keep_log(machine, error)
        if not keep:
            note_failure(error, lambda: machine.destroy(lambda _: None), f"machine {machine.name} could not be removed")
        if isinstance(error, VmTasksError):
            raise error.but(log=log) from error
        raise


def _keep_log(machine: Machine, error: BaseException) -> Path | None:
    """Where the log is that the error names: it goes with the machine, so a copy is kept, one for each project."""
    log = error.log if isinstance(error, VmTasksError) else None
    if log is None:
        return None
    kept = machine.config.vm_dir / "failed-boot.log"
    with contextlib.suppress(OSError):
        shutil.copyfile(log, kept)
        return kept
    return log
