"""Tasks that make images: fetch, render, phase_iso, phase, snapshot, auto_install, clean_phases."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from doit.tools import config_changed

from vmtasks import progress
from vmtasks.config import Config
from vmtasks.state import State
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
    """Up to date only if what the task's record names is in the store, whole. Its repr says why not."""

    def __init__(self, check: partial[str]) -> None:
        """`check` returns why the target is stale, or an empty string."""
        self._check = check

    def __call__(self, task: Any, values: Any) -> bool:  # noqa: ARG002 - doit passes them by name
        """What doit asks."""
        return not self._check()

    def __repr__(self) -> str:
        """What `doit info` prints."""
        return self._check() or "in the store, intact"


def run_step(name: str, *arguments: int, **options: bool) -> None:
    """Carry out a build step. What that needs is imported only now: most runs have nothing to build."""
    from vmtasks.build import Builder  # noqa: PLC0415

    getattr(Builder(CONFIG), name)(*arguments, **options)


def _numbers(config: Config) -> range:
    return range(1, len(config.guest.phases) + 1)


def _inputs(config: Config) -> list[str]:
    return [str(config.guest_dir / "guest.toml")]


def task_fetch() -> Task:
    """Have the installer: download it, or compose it from packages."""
    state = State(CONFIG)
    overlay = [str(p) for p in sorted((CONFIG.guest_dir / "files").rglob("*")) if p.is_file() and not p.is_symlink()]

    def fetch(allow_unverified: bool) -> None:  # noqa: FBT001 - doit passes it by name
        run_step("fetch", allow_unverified=allow_unverified)

    return {
        "actions": [action(fetch)],
        "params": [UNVERIFIED_PARAM],
        "file_dep": [*_inputs(CONFIG), *overlay],
        "targets": [str(state.installer_record)],
        "uptodate": [Intact(partial(state.why_stale, 0)), config_changed(CONFIG.version)],
        "io": {"capture": False},
    }


def task_render() -> Iterator[Task]:
    """Render the phase scripts with the configuration."""
    state = State(CONFIG)
    for number in _numbers(CONFIG):
        folder = state.folder(number)
        yield {
            "name": str(number),
            "actions": [action(partial(run_step, "render", number))],
            "file_dep": [*_inputs(CONFIG), str(CONFIG.template(state.phase(number)))],
            "targets": [str(folder / name) for name in ("lib.sh", "pfi.conf", "phase.sh", "poweroff", "run.sh")],
            "uptodate": [config_changed(_values(state))],
            "io": {"capture": False},
        }


def _values(state: State) -> str:
    """What a template is rendered with. Two stores have two keys, and one project may see both."""
    config, public = CONFIG, state.key.with_suffix(".pub")
    key = public.read_text() if public.is_file() else ""
    return repr((sorted(config.vars.items()), config.version, config.guest.ssh.user, key))


def task_phase_iso() -> Iterator[Task]:
    """Put each phase's scripts and packages on an ISO."""
    state = State(CONFIG)
    for number in _numbers(CONFIG):
        folder = state.folder(number)
        yield {
            "name": str(number),
            "actions": [action(partial(run_step, "phase_iso", number))],
            "file_dep": [
                *(str(folder / name) for name in ("lib.sh", "pfi.conf", "phase.sh", "poweroff", "run.sh")),
                str(state.installer_record),
            ],
            "targets": [str(state.iso(number))],
            "io": {"capture": False},
        }


def task_phase() -> Iterator[Task]:
    """Boot each phase, unattended, and publish the image that it leaves."""
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
                config_changed(str(CONFIG.disk_size)),
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
    """Install the guest, unattended: all phases, then the clean snapshot."""
    return {"actions": None, "task_dep": ["snapshot"]}


def task_clean_phases() -> Task:
    """Remove rendered phases and phase ISOs; images stay."""
    state = State(CONFIG)

    def clean() -> None:
        gone = 0
        for number in _numbers(CONFIG):
            for path in (state.folder(number), state.iso(number)):
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
