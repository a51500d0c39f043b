"""Tasks that make images: fetch, render, phase_iso, phase, snapshot, auto_install, clean_phases."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from doit.tools import config_changed

from vmtasks import progress
from vmtasks.build import Builder
from vmtasks.config import Config
from vmtasks.tasks.context import CONFIG, action

Task = dict[str, Any]


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


def _numbers(config: Config) -> range:
    return range(1, len(config.guest.phases) + 1)


def _inputs(config: Config) -> list[str]:
    return [str(config.guest_dir / "guest.toml")]


def task_fetch() -> Task:
    """Have the installer: download it, or compose it from packages."""
    builder = Builder(CONFIG)
    overlay = [str(p) for p in sorted((CONFIG.guest_dir / "files").rglob("*")) if p.is_file() and not p.is_symlink()]
    return {
        "actions": [action(builder.fetch)],
        "file_dep": [*_inputs(CONFIG), *overlay],
        "targets": [str(builder.installer_record)],
        "uptodate": [Intact(partial(builder.why_stale, 0)), config_changed(CONFIG.version)],
        "io": {"capture": False},
    }


def task_render() -> Iterator[Task]:
    """Render the phase scripts with the configuration."""
    builder = Builder(CONFIG)
    yield {"name": None, "doc": "render the phase scripts with the configuration"}
    for number in _numbers(CONFIG):
        folder = builder.folder(number)
        yield {
            "name": str(number),
            "actions": [action(partial(builder.render, number))],
            "file_dep": [*_inputs(CONFIG), str(CONFIG.template(builder.phase(number)))],
            "targets": [str(folder / name) for name in ("lib.sh", "pfi.conf", "phase.sh", "poweroff", "run.sh")],
            "uptodate": [config_changed(_values(builder))],
            "io": {"capture": False},
        }


def _values(builder: Builder) -> str:
    """What a template is rendered with. Two stores have two keys, and one project may see both."""
    config, public = CONFIG, builder.key.with_suffix(".pub")
    key = public.read_text() if public.is_file() else ""
    return repr((sorted(config.vars.items()), config.version, config.guest.ssh.user, key))


def task_phase_iso() -> Iterator[Task]:
    """Put each phase's scripts and packages on an ISO."""
    builder = Builder(CONFIG)
    yield {"name": None, "doc": "put each phase's scripts and packages on an ISO"}
    for number in _numbers(CONFIG):
        folder = builder.folder(number)
        yield {
            "name": str(number),
            "actions": [action(partial(builder.phase_iso, number))],
            "file_dep": [
                *(str(folder / name) for name in ("lib.sh", "pfi.conf", "phase.sh", "poweroff", "run.sh")),
                str(builder.installer_record),
            ],
            "targets": [str(builder.iso(number))],
            "io": {"capture": False},
        }


def task_phase() -> Iterator[Task]:
    """Boot each phase, unattended, and publish the image that it leaves."""
    builder = Builder(CONFIG)
    yield {"name": None, "doc": "boot each phase, unattended, and publish the image that it leaves"}
    for number in _numbers(CONFIG):
        yield {
            "name": str(number),
            "doc": builder.phase(number).name,
            "actions": [action(partial(builder.build, number))],
            "file_dep": [*_inputs(CONFIG), str(builder.record(number - 1)), str(builder.iso(number))],
            "targets": [str(builder.record(number))],
            "uptodate": [Intact(partial(builder.why_stale, number)), config_changed(str(CONFIG.disk_size))],
            "io": {"capture": False},
        }


def task_auto_install() -> Task:
    """Install the guest, unattended: all phases, then the clean snapshot."""
    return {"actions": None, "task_dep": ["snapshot"]}


def task_clean_phases() -> Task:
    """Remove rendered phases and phase ISOs; images stay."""
    builder = Builder(CONFIG)

    def clean() -> None:
        gone = 0
        for number in _numbers(CONFIG):
            for path in (builder.folder(number), builder.iso(number)):
                gone += _remove(path)
        progress.say(f"clean_phases: {gone} removed below {builder.state}")

    return {"actions": [action(clean)], "io": {"capture": False}}


def _remove(path: Path) -> int:
    if path.is_dir():
        shutil.rmtree(path)
        return 1
    existed = path.exists()
    path.unlink(missing_ok=True)
    return int(existed)
