"""Tasks that make images: fetch, render, phase_iso, phase, snapshot, auto_install, clean_phases."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from vmtasks.errors import VmTasksError
from vmtasks.images.plan import Node
from vmtasks.images.reader import MODES, SHIPPED, Reader
from vmtasks.images.workspace import Workspace
from vmtasks.media.template import shipped_path
from vmtasks.tasks.context import CONFIG, action

Task = dict[str, Any]
STEP = "vmtasks.tasks.actions.images:run_step"
UNVERIFIED_PARAM = {
    "name": "allow_unverified",
    "long": "allow-unverified",
    "type": bool,
    "default": False,
    "help": "accept a download with no known digest",
}


class UpToDate:
    """A doit `uptodate` check whose repr says why the task is stale."""

    def __init__(self, check: partial[str]) -> None:
        """`check` returns why the task is stale, or ''."""
        self._check = check

    def __call__(self, task: Any, values: Any) -> bool:  # noqa: ARG002 - doit passes them by name
        """What doit calls."""
        return not self._why()

    def __repr__(self) -> str:
        """What `doit info` prints."""
        return self._why() or "there, intact"

    def _why(self) -> str:
        """A failed check means stale: the action then runs into the same error and reports it."""
        try:
            return self._check()
        except VmTasksError as error:
            return error.message
        except OSError as error:
            return str(error)


@cache
def nodes() -> dict[str, Node]:
    """The plan of the images. Each build step clears this cache, so that the next call reads the files again."""
    return Reader(CONFIG).nodes()


def step_up_to_date(name: str) -> UpToDate:
    """The check of build step `name`. No other check decides whether it runs."""
    return UpToDate(partial(_why, name))


def _why(name: str) -> str:
    return Reader(CONFIG).why_stale(name, nodes())


def _reads(*paths: Path) -> dict[str, Any]:
    """The inputs that `doit info` lists. As `file_dep`, doit would compare them too."""
    return {"reads": [str(CONFIG.guest_dir / "guest.toml"), *map(str, paths)]}


def task_fetch() -> Task:
    """Fetch the installer: download it, or compose it from packages.

    Takes what the store has and resumes an interrupted download. Verifies it against the digests in guest.toml, or
    against the mirror's checksum file; a version that has neither needs --allow-unverified.

    Exit status: 0 it is in the store; 1 it could not be fetched, or its digest is wrong; 2 wrong configuration.
    Example: doit version=6.4.0 fetch
    """
    return {
        "actions": [action(STEP, "fetch")],
        "params": [UNVERIFIED_PARAM],
        "targets": [str(Workspace(CONFIG).installer_record)],
        "uptodate": [step_up_to_date("fetch")],
        "meta": _reads(),
        "io": {"capture": False},
    }


def task__key() -> Task:
    """Make the store's key pair, whose public key the rendered phases install in the guest.

    Exit status: 0 it exists; 1 it could not be made.
    Example: doit render
    """
    state = Workspace(CONFIG)
    return {
        "actions": [action(STEP, "make_key")],
        "targets": [str(state.key), str(state.public_key)],
        "uptodate": [True],
        "io": {"capture": False},
    }


def task_render() -> Iterator[Task]:
    """Render the phase scripts with the configuration.

    Writes `.vm/<guest>/phase-N/` from `phases/<guest>/`, with every value quoted for the shell. Leaves unchanged files
    alone, so that a change without effect on the text runs nothing.

    Exit status: 0 rendered; 2 a template is wrong, with its file and line.
    Example: doit render:3
    """
    state = Reader(CONFIG)
    for number in state.numbers:
        yield {
            "name": str(number),
            "actions": [action(STEP, "render", number)],
            "task_dep": ["_key"],
            "targets": [str(state.folder(number) / name) for name in MODES],
            "uptodate": [step_up_to_date(f"render:{number}")],
            "meta": _reads(CONFIG.template(state.phase(number)), *map(shipped_path, SHIPPED)),
            "io": {"capture": False},
        }


def task_phase_iso() -> Iterator[Task]:
    """Put each phase's scripts and packages on an ISO.

    Writes `.vm/<guest>/phase-N.iso`, with `pfi.conf`. The same files give the same bytes.

    Exit status: 0 written; 1 it could not be.
    Example: doit phase_iso:3
    """
    state = Reader(CONFIG)
    for number in state.numbers:
        yield {
            "name": str(number),
            "actions": [action(STEP, "phase_iso", number)],
            "task_dep": ["fetch", f"render:{number}"],
            "targets": [str(state.iso(number))],
            "uptodate": [step_up_to_date(f"phase_iso:{number}")],
            "meta": _reads(state.folder(number), state.installer_record),
            "io": {"capture": False},
        }


def task_phase() -> Iterator[Task]:
    """Boot each phase, unattended, and publish the image that it leaves.

    `phase:N` needs phase N-1; a finished phase does not boot again. A phase has passed when its script exited with 0,
    the guest powered itself off, and qemu-img finds no damage. A failure names the cause, the step, the last console
    lines, the log, and a script that boots a copy of the disk. `doit look:N` boots what a phase starts from.

    Exit status: 0 the image is in the store; 1 the phase failed; 2 wrong configuration.
    Example: doit phase:2 --anew
    """
    state = Reader(CONFIG)
    for number in state.numbers:
        yield {
            "name": str(number),
            "doc": state.phase(number).name,
            "actions": [action(STEP, "build", number)],
            "params": [
                {
                    "name": "anew",
                    "long": "anew",
                    "type": bool,
                    "default": False,
                    "help": "boot it although its image exists: for packages that changed on their server",
                }
            ],
            "task_dep": [f"phase:{number - 1}" if number > 1 else "fetch", f"phase_iso:{number}"],
            "targets": [str(state.record(number))],
            "uptodate": [step_up_to_date(f"phase:{number}"), without_option("anew")],
            "meta": _reads(state.record(number - 1), state.iso(number)),
            "io": {"capture": False},
        }


def without_option(name: str) -> Callable[[Any, Any], bool]:
    """Up to date only if the task was not given the option `name`."""

    def check(task: Any, values: Any) -> bool:  # noqa: ARG001 - doit passes them by name
        return not (task.options or {}).get(name)

    return check


def task_auto_install() -> Task:
    """Install the guest, unattended: all phases, then the clean snapshot.

    Asks nothing and needs no terminal. After a kill it resumes with the first unfinished phase. Machines are made from
    the clean snapshot: next comes `doit start` or `doit quick`.

    Exit status: 0 the clean image exists; 1 a phase failed; 2 wrong configuration.
    Example: doit guest=tiny auto_install
    """
    return {"actions": None, "task_dep": ["snapshot"]}


def task_clean_phases() -> Task:
    """Remove rendered phases and phase ISOs; images stay.

    Also removes what killed runs left: temporary files, and the disk copies of `doit look:N`. The same files are made
    again when needed, so that nothing has to boot. `vmtasks prune` removes images that no project needs.

    Exit status: 0.
    Example: doit clean_phases
    """
    return {"actions": [action("vmtasks.tasks.actions.images:clean_phases")], "io": {"capture": False}}
