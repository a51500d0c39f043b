"""Tasks that make images: fetch, render, phase_iso, phase, snapshot, auto_install, clean_phases."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from vmtasks.errors import VmTasksError
from vmtasks.host import files, progress
from vmtasks.images.plan import Node
from vmtasks.images.reader import MODES, SHIPPED, Reader
from vmtasks.images.workspace import State
from vmtasks.media.template import shipped_path
from vmtasks.tasks.context import CONFIG, action

Task = dict[str, Any]
UNVERIFIED_PARAM = {
    "name": "allow_unverified",
    "long": "allow-unverified",
    "type": bool,
    "default": False,
    "help": "take a download although no digest of it is known",
}


class Intact:
    """Up to date only if what the task makes is there, whole. Its repr says why not."""

    def __init__(self, check: partial[str]) -> None:
        """`check` returns why the target is stale, or an empty string."""
        self._check = check

    def __call__(self, task: Any, values: Any) -> bool:  # noqa: ARG002 - doit passes them by name
        """What doit asks."""
        return not self._why()

    def __repr__(self) -> str:
        """What `doit info` prints."""
        return self._why() or "there, intact"

    def _why(self) -> str:
        """What cannot be looked at is stale; the task's action then says so as an error of its own."""
        try:
            return self._check()
        except VmTasksError as error:
            return error.message
        except OSError as error:
            return str(error)


@cache
def nodes() -> dict[str, Node]:
    """The plan of the images, of what is on the host when it is first asked for after each step."""
    return Reader(CONFIG).nodes()


def judge(name: str) -> Intact:
    """Whether the step `name` is up to date: nothing else decides."""
    return Intact(partial(_why, name))


def _why(name: str) -> str:
    return Reader(CONFIG).why_stale(name, nodes())


def run_step(name: str, *arguments: int, **options: bool) -> None:
    """Carry out a build step. What that needs is imported only now: most runs have nothing to build."""
    from vmtasks.images.steps import Builder  # noqa: PLC0415

    try:
        getattr(Builder(CONFIG), name)(*arguments, **options)
    finally:
        nodes.cache_clear()


def _reads(*paths: Path) -> dict[str, Any]:
    """What `doit info` lists. Not file_dep: doit would judge by it whether the task is up to date."""
    return {"reads": [str(CONFIG.guest_dir / "guest.toml"), *map(str, paths)]}


def task_fetch() -> Task:
    """Have the installer: download it, or compose it from packages.

    What is in the store is not fetched again, and a download that was cut goes on where it stopped. It is held against
    the digests that guest.toml knows, or the mirror's list of sums; a version that has neither needs
    --allow-unverified.

    Exit status: 0 it is there; 1 it could not be fetched, or is not what its digest promises; 2 wrong configuration.
    Example: doit version=6.4.0 fetch
    """
    state = State(CONFIG)

    def fetch(allow_unverified: bool) -> None:  # noqa: FBT001 - doit passes it by name
        run_step("fetch", allow_unverified=allow_unverified)

    return {
        "actions": [action(fetch)],
        "params": [UNVERIFIED_PARAM],
        "targets": [str(state.installer_record)],
        "uptodate": [judge("fetch")],
        "meta": _reads(),
        "io": {"capture": False},
    }


def task__key() -> Task:
    """Make the key pair that logs in to all guests of the store: what is rendered holds its public half.

    Exit status: 0 it is there; 1 it could not be made.
    Example: doit render
    """
    state = State(CONFIG)
    return {
        "actions": [action(partial(run_step, "make_key"))],
        "targets": [str(state.key), str(state.public_key)],
        "uptodate": [True],
        "io": {"capture": False},
    }


def task_render() -> Iterator[Task]:
    """Render the phase scripts with the configuration.

    Writes `.vm/<guest>/phase-N/` from `phases/<guest>/`, with every value quoted for the shell. Files that would be as
    they were are left alone, so that nothing runs for a change that changes no text.

    Exit status: 0 rendered; 2 a template is wrong, with its file and line.
    Example: doit render:3
    """
    state = Reader(CONFIG)
    for number in state.numbers:
        yield {
            "name": str(number),
            "actions": [action(partial(run_step, "render", number))],
            "task_dep": ["_key"],
            "targets": [str(state.folder(number) / name) for name in MODES],
            "uptodate": [judge(f"render:{number}")],
            "meta": _reads(CONFIG.template(state.phase(number)), *map(shipped_path, SHIPPED)),
            "io": {"capture": False},
        }


def task_phase_iso() -> Iterator[Task]:
    """Put each phase's scripts and packages on an ISO.

    Writes `.vm/<guest>/phase-N.iso`, with `pfi.conf`, byte for byte the same from the same files.

    Exit status: 0 written; 1 it could not be.
    Example: doit phase_iso:3
    """
    state = Reader(CONFIG)
    for number in state.numbers:
        yield {
            "name": str(number),
            "actions": [action(partial(run_step, "phase_iso", number))],
            "task_dep": ["fetch", f"render:{number}"],
            "targets": [str(state.iso(number))],
            "uptodate": [judge(f"phase_iso:{number}")],
            "meta": _reads(state.folder(number), state.installer_record),
            "io": {"capture": False},
        }


def task_phase() -> Iterator[Task]:
    """Boot each phase, unattended, and publish the image that it leaves.

    `phase:N` needs phase N-1; what is done is not booted again. A phase is believed when its script ended with 0, the
    guest powered itself off, and its disk is sound. After a failure the message names the cause, the step, the last
    lines, the log, and a script that boots a copy of the disk. `doit look:N` shows what a phase starts from.

    Exit status: 0 the image is in the store; 1 the phase failed; 2 wrong configuration.
    Example: doit phase:2 --anew
    """
    state = Reader(CONFIG)
    for number in state.numbers:
        yield {
            "name": str(number),
            "doc": state.phase(number).name,
            "actions": [action(partial(_build, number))],
            "params": [
                {
                    "name": "anew",
                    "long": "anew",
                    "type": bool,
                    "default": False,
                    "help": "boot it although its image is there: for packages that have changed elsewhere",
                }
            ],
            "task_dep": [f"phase:{number - 1}" if number > 1 else "fetch", f"phase_iso:{number}"],
            "targets": [str(state.record(number))],
            "uptodate": [judge(f"phase:{number}"), without_option("anew")],
            "meta": _reads(state.record(number - 1), state.iso(number)),
            "io": {"capture": False},
        }


def _build(number: int, anew: bool) -> None:  # noqa: FBT001 - doit passes it by name
    run_step("build", number, anew=anew)


def without_option(name: str) -> Callable[[Any, Any], bool]:
    """Up to date only if the task was not given the option `name`."""

    def check(task: Any, values: Any) -> bool:  # noqa: ARG001 - doit passes them by name
        return not (task.options or {}).get(name)

    return check


def task_auto_install() -> Task:
    """Install the guest, unattended: all phases, then the clean snapshot.

    Asks nothing and needs no terminal. Killed at any moment and started again, it goes on with the phase that was not
    done. Machines are made from the clean snapshot: next comes `doit start` or `doit quick`.

    Exit status: 0 the clean image is there; 1 a phase failed; 2 wrong configuration.
    Example: doit guest=tiny auto_install
    """
    return {"actions": None, "task_dep": ["snapshot"]}


def task_clean_phases() -> Task:
    """Remove rendered phases and phase ISOs; images stay.

    Also what killed runs have left: unfinished files, and the copies of disks of `doit look:N`. Nothing has to
    boot afterwards: the same files are made again when they are needed. `vmtasks prune` removes images that no project
    needs.

    Exit status: 0.
    Example: doit clean_phases
    """
    state = Reader(CONFIG)

    def clean() -> None:
        gone = 0
        for number in state.numbers:
            for path in (state.folder(number), state.iso(number), state.look_disk(number)):
                gone += _remove(path)
            for path in (state.render_file(number), state.iso_file(number)):
                path.unlink(missing_ok=True)
        for path in files.abandoned(state.home):
            gone += _remove(path)
        progress.say(f"clean_phases: {gone} removed below {state.home}")

    return {"actions": [action(clean)], "io": {"capture": False}}


def _remove(path: Path) -> int:
    if path.is_dir():
        shutil.rmtree(path)
        return 1
    existed = path.exists()
    path.unlink(missing_ok=True)
    return int(existed)
