"""Freeze a running machine's RAM, devices and disk inside its own disk file, and go back to that moment.

QEMU's internal snapshots (QMP snapshot-save, snapshot-load; QEMU 6.0 and later). They live and die with the overlay.
"""

import itertools
import time
from pathlib import Path
from typing import Any

from vmtasks.errors import MachineError
from vmtasks.qemu import qmp

JOB_S = 120.0
NODE = "disk0"
"""The disk's node in argv.disk()."""

_jobs = itertools.count(1)


def save(socket: Path, tag: str) -> None:
    """Keep this moment as `tag`; the machine stands still meanwhile. MachineError if QEMU cannot."""
    _job(socket, "snapshot-save", tag, vmstate=NODE, devices=[NODE])


def load(socket: Path, tag: str) -> None:
    """Go back to the moment `tag`; the machine then runs on. MachineError if there is none.

    Connections from outside are not part of it: they are dead afterwards. The guest's clock is that of the moment.
    """
    _job(socket, "snapshot-load", tag, vmstate=NODE, devices=[NODE])


def _job(socket: Path, command: str, tag: str, **arguments: Any) -> None:
    """Carry out a job of QEMU's to its end, and leave the machine running."""
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
            raise MachineError(f"QEMU could not carry out {command} {tag!r}: {job['error']}")
        if command == "snapshot-load":
            control.cmd("cont")
