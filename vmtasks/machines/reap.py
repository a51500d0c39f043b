"""Remove machines that are over: their process is gone, their lease has run out, or they were to go when they stopped.

Every command asks this first, so that it costs nothing where nothing is over: a record is only parsed when its text
says that it can be.
"""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vmtasks.errors import BusyError, MachineError, StateError, VmTasksError
from vmtasks.host import files, processes, progress
from vmtasks.host.locks import drop
from vmtasks.machines import life
from vmtasks.machines.folder import Place
from vmtasks.qemu import vm

STAGED = ".new-"
MAY_BE_OVER = re.compile(rb"^(?:owner = [1-9]|throwaway = true|lease_until = [0-9.]*[1-9])", re.MULTILINE)
"""Stands in the record of a machine that can be over."""

OpenPlace = Callable[[str], Place]
"""The machine of a name."""


def reap(run: Path, open_place: OpenPlace) -> list[str]:
    """Remove the machines in `run` that are over, and what half-made ones have left; their names.

    What somebody is at work on is left alone. A machine that cannot be removed is a warning: nothing here may keep
    a command from its own work.
    """
    with suppress(MachineError, OSError):
        vm.reap_sockets()
    gone = []
    for path in sorted(run.iterdir()) if run.is_dir() else ():
        if path.name.startswith("."):
            _drop_leftover(path, open_place)
            continue
        try:
            why = _reap_machine(path, open_place)
        except BusyError:
            continue
        except (VmTasksError, OSError) as error:
            progress.say(f"warning: machine {path.name} is over and could not be removed: {error}")
            continue
        if why:
            gone.append(path.name)
            progress.say(f"machine {path.name}: removed, because {why}")
    return gone


def why_over(place: Place) -> str:
    """Why a machine is of no more use, as its record tells; empty when it is, or when that cannot be known."""
    record = place.state.machine(place.name)
    if record is None:
        return ""
    if record.lease_until and time.time() > record.lease_until:
        return "its lease has run out"
    if record.owner:
        over = processes.started(record.owner) != record.owner_started
        return "the command that it belonged to is gone" if over else ""
    return "it has ended" if record.throwaway and record.pid and place.pid(record) is None else ""


def _reap_machine(folder: Path, open_place: OpenPlace) -> str:
    """Remove a machine that is over; returns why it was, or nothing. An empty folder goes too."""
    if not _may_be_over(folder):
        return ""
    place = open_place(folder.name)
    if not why_over(place) and not _is_empty(folder):
        return ""
    with place.lock(0, say=False):  # and again: it may be another machine of that name by now
        if why := why_over(place):
            life.remove(place)
        elif _is_empty(folder):
            folder.rmdir()
        if not folder.exists():
            drop(place.lock_file)
        return why


def _may_be_over(folder: Path) -> bool:
    """Whether the machine may be over, or the folder may hold none."""
    try:
        return MAY_BE_OVER.search(files.read(folder / "machine.toml")) is not None
    except FileNotFoundError:
        return _is_empty(folder)
    except OSError:
        return False


def _drop_leftover(path: Path, open_place: OpenPlace) -> None:
    """Remove what was staged by a process that is gone, or the lock of a machine that is."""
    staged = re.fullmatch(rf"{re.escape(STAGED)}(\d+)-.*", path.name)
    if staged is not None and not processes.started(int(staged[1])):
        shutil.rmtree(path, ignore_errors=True)
    if path.suffix != ".lock":
        return
    name = path.stem.removeprefix(".")
    if path.with_name(name).exists():
        return
    place = open_place(name)
    with suppress(StateError, OSError), place.lock(0, say=False):
        if not place.folder.exists():
            drop(path)


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False
