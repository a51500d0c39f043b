"""Remove expired machines: their owner is gone, their lease has run out, or a throwaway machine has stopped.

Every command does this first, so it must be cheap if nothing has expired: a record is parsed only if its text shows
that its machine can expire.
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
CAN_EXPIRE = re.compile(rb"^(?:owner = [1-9]|throwaway = true|lease_until = [0-9.]*[1-9])", re.MULTILINE)
"""Matches the record of a machine that can expire."""

OpenPlace = Callable[[str], Place]
"""Opens the machine of a name."""


def reap(run: Path, open_place: OpenPlace) -> list[str]:
    """Remove the expired machines in `run`, and leftovers of half-made ones; returns the names.

    Skips machines that another command has locked. A machine that cannot be removed is only a warning: reaping must
    not keep a command from its work.
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
            progress.say(f"warning: machine {path.name} has expired and could not be removed: {error}")
            continue
        if why:
            gone.append(path.name)
            progress.say(f"machine {path.name}: removed, because {why}")
    return gone


def why_expired(place: Place) -> str:
    """Why a machine has expired, by its record; '' if it has not, or cannot be judged."""
    record = place.state.machine(place.name)
    if record is None:
        return ""
    if record.lease_until and time.time() > record.lease_until:
        return "its lease has run out"
    if record.owner:
        over = processes.started(record.owner) != record.owner_started
        return "the command that owned it is gone" if over else ""
    return "it has ended" if record.throwaway and record.pid and place.pid(record) is None else ""


def _reap_machine(folder: Path, open_place: OpenPlace) -> str:
    """Remove an expired machine; returns why, or ''. Removes an empty folder too."""
    if not _may_have_expired(folder):
        return ""
    place = open_place(folder.name)
    if not why_expired(place) and not _is_empty(folder):
        return ""
    with place.lock(0, say=False):  # check again: another machine may have that name by now
        if why := why_expired(place):
            life.remove(place)
        elif _is_empty(folder):
            folder.rmdir()
        if not folder.exists():
            drop(place.lock_file)
        return why


def _may_have_expired(folder: Path) -> bool:
    """Whether the machine may have expired, or the folder may be empty."""
    try:
        return CAN_EXPIRE.search(files.read(folder / "machine.toml")) is not None
    except FileNotFoundError:
        return _is_empty(folder)
    except OSError:
        return False


def _drop_leftover(path: Path, open_place: OpenPlace) -> None:
    """Remove a staged folder of a dead process, or the lock of a removed machine."""
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
