"""Tasks that make images: fetch, render, phase_iso, phase, snapshot, auto_install, clean_phases."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from doit.tools import config_changed

from vmtasks.config.load import Config
from vmtasks.errors import VmTasksError
from vmtasks.host import files, progress
from vmtasks.images import plan
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


class AsLeft:
    """Up to date only while files are as the task's action has left them, by their size and times."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Nothing is looked at yet."""
        self._paths = paths

    def __call__(self, task: Any, values: dict[str, Any]) -> bool:  # noqa: ARG002 - doit passes them by name
        """What doit asks."""
        return bool(values.get("left") == self.stamps())

    def __repr__(self) -> str:
        """What `doit info` prints."""
        return "as they were written"

    def stamps(self) -> list[list[int]]:
        """What doit keeps."""
        found = (path.lstat() for path in self._paths if path.is_file())
        return [[info.st_size, info.st_mtime_ns, info.st_ino] for info in found]

    def after(self, function: Callable[[], object]) -> Callable[[], dict[str, Any]]:
        """The action that leaves the files."""

        def run() -> dict[str, Any]:
            function()
            return {"left": self.stamps()}

        return run


def run_step(name: str, *arguments: int, **options: bool) -> None:
    """Carry out a build step. What that needs is imported only now: most runs have nothing to build."""
    from vmtasks.images.steps import Builder  # noqa: PLC0415

    getattr(Builder(CONFIG), name)(*arguments, **options)


def _numbers(config: Config) -> range:
    return range(1, len(config.guest.phases) + 1)


def _inputs(config: Config) -> list[str]:
    return [str(config.guest_dir / "guest.toml")]


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
        "uptodate": [Intact(partial(state.why_stale, 0))],
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
    state = State(CONFIG)
    common = [str(path) for path in (state.public_key, shipped_path("lib.sh"), shipped_path("run.sh"))]
    values = repr((plan.FORMAT, sorted(CONFIG.vars.items()), CONFIG.version))
    for number in _numbers(CONFIG):
        left = AsLeft(state.rendered(number))
        yield {
            "name": str(number),
            "actions": [action(left.after(partial(run_step, "render", number)))],
            "file_dep": [*_inputs(CONFIG), str(CONFIG.template(state.phase(number))), *common],
            "targets": [str(path) for path in state.rendered(number)],
            "uptodate": [config_changed(values), left],
            "io": {"capture": False},
        }


def task_phase_iso() -> Iterator[Task]:
    """Put each phase's scripts and packages on an ISO.

    Writes `.vm/<guest>/phase-N.iso`, with `pfi.conf`, byte for byte the same from the same files.

    Exit status: 0 written; 1 it could not be.
    Example: doit phase_iso:3
    """
    state = State(CONFIG)
    for number in _numbers(CONFIG):
        iso = state.iso(number)
        yield {
            "name": str(number),
            "actions": [action(partial(run_step, "phase_iso", number))],
            "file_dep": [*map(str, state.rendered(number)), str(state.installer_record)],
            "targets": [str(iso)],
            "uptodate": [config_changed(str(plan.FORMAT)), Intact(partial(_no_file, iso))],
            "io": {"capture": False},
        }


def _no_file(iso: Path) -> str:
    return "" if iso.is_file() else f"{iso} is not a file"


def task_phase() -> Iterator[Task]:
    """Boot each phase, unattended, and publish the image that it leaves.

    `phase:N` needs phase N-1; what is done is not booted again. A phase is believed when its script ended with 0, the
    guest powered itself off, and its disk is sound. After a failure the message names the cause, the step, the last
    lines, the log, and a script that boots a copy of the disk. `doit look:N` shows what a phase starts from.

    Exit status: 0 the image is in the store; 1 the phase failed; 2 wrong configuration.
    Example: doit phase:2 --anew
    """
    state = State(CONFIG)
    for number in _numbers(CONFIG):
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
            "file_dep": [*_inputs(CONFIG), str(state.record(number - 1)), str(state.iso(number))],
            "targets": [str(state.record(number))],
            "uptodate": [
                Intact(partial(state.why_stale, number)),
                config_changed(repr((plan.FORMAT, CONFIG.disk_size))),
                without_option("anew"),
            ],
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
    state = State(CONFIG)

    def clean() -> None:
        gone = 0
        for number in _numbers(CONFIG):
            for path in (state.folder(number), state.iso(number), state.look_disk(number)):
                gone += _remove(path)
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
