"""A machine for the length of a block: removed on every exit, and reaped after a kill."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmtasks.errors import VmTasksError, finally_do, note_failure
from vmtasks.machines.machine import Machine
from vmtasks.machines.project import Project
from vmtasks.machines.spec import MachineSpec


@contextlib.contextmanager
def temp_machine(
    image: str | MachineSpec = "", *, project: Project | None = None, keep: bool = False, **asked: Any
) -> Iterator[Machine]:
    """A running machine for the length of the block; then it is removed with its disk and key.

    `image` is GUEST or GUEST:SNAPSHOT, by default the project's guest, or a whole MachineSpec. `asked` as for
    MachineSpec.parse(): `memory="512M"`, `cpus=2`, `forwards=["8080:80"]`. `project` defaults to that of the current
    folder. `keep` leaves it running. Otherwise the machine is removed however the block ends; if this process is
    killed, the kernel ends QEMU (if the main thread started it), and the next command removes the rest.

    Raises what Project.create() and Machine.start() raise; the console's log of a boot that failed is kept as
    `failed-boot.log` in the state folder.
    """
    spec = image if isinstance(image, MachineSpec) else MachineSpec.parse(image, **asked)
    if project is None:
        project = Project.here()
        project.reap()
    machine = project.create(replace(spec, throwaway=not keep), owner=0 if keep else os.getpid())
    # The kernel would end it with the thread, not with the process.
    main = threading.current_thread() is threading.main_thread()
    first_start(machine, die_with_us=main and not keep, keep=keep)
    with contextlib.ExitStack() as stack:
        if not keep:
            stack.enter_context(finally_do(machine.remove, f"machine {machine.name} could not be removed"))
        stack.callback(machine.close)
        yield machine


def first_start(machine: Machine, *, die_with_us: bool = False, keep: bool = False) -> None:
    """Start a machine that was just created; remove it if that fails, unless `keep`.

    Raises what Machine.start() raises.
    """
    try:
        machine.start(die_with_us=die_with_us)
    except BaseException as error:
        log = _keep_log(machine, error)
        if not keep:
            note_failure(error, machine.remove, f"machine {machine.name} could not be removed")
        if isinstance(error, VmTasksError):
            raise error.replace(log=log) from error
        raise


def _keep_log(machine: Machine, error: BaseException) -> Path | None:
    """Copy the error's log, which is removed with the machine; returns the path. One copy for each project."""
    log = error.log if isinstance(error, VmTasksError) else None
    if log is None:
        return None
    kept = machine.config.vm_dir / "failed-boot.log"
    with contextlib.suppress(OSError):
        shutil.copyfile(log, kept)
        return kept
    return log
