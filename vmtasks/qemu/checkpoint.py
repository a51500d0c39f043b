"""Checkpoints: save a running machine's RAM, devices and disk in its own disk file, and roll back to them.

Uses QEMU's internal snapshots (QMP snapshot-save, snapshot-load; QEMU 6.0 and later), which are part of the overlay.
"""

import itertools
import time
from pathlib import Path
from typing import Any

from vmtasks.errors import MachineError
from vmtasks.qemu import qmp

JOB_S = 120.0
NODE = "disk0"
"""The disk's node name in argv.disk()."""

_jobs = itertools.count(1)


def save(socket: Path, tag: str) -> None:
    """Save a checkpoint; the machine is paused meanwhile. MachineError if QEMU cannot."""
    _job(socket, "snapshot-save", tag, vmstate=NODE, devices=[NODE])


def load(socket: Path, tag: str) -> None:
    """Roll back to checkpoint `tag` and resume the machine. MachineError if there is none.

    Connections from outside break. The guest's clock is that of the checkpoint.
    """
    _job(socket, "snapshot-load", tag, vmstate=NODE, devices=[NODE])


def _job(socket: Path, command: str, tag: str, **arguments: Any) -> None:
    """Run a QMP job to its end, and leave the machine running."""
    name = f"vmtasks{next(_jobs)}"
    with qmp.connect(socket, timeout_s=5) as control:
        control.cmd(command, **{"job-id": name, "tag": tag, **arguments})
        until = time.monotonic() + JOB_S
        while True:
            job = next((job for job in control.cmd("query-jobs") if job["id"] == name), None)
            if job is None or job["status"] == "concluded":
                break
            if time.monotonic() > until:
                raise MachineError(f"QEMU did not finish {command} {tag!r} within {JOB_S:.0f} s: it is {job['status']}")
            time.sleep(0.02)
        if job is not None:
            control.cmd("job-dismiss", id=name)
        if job is not None and "error" in job:
            raise MachineError(f"QEMU could not run {command} {tag!r}: {job['error']}")
        if command == "snapshot-load":
            control.cmd("cont")
