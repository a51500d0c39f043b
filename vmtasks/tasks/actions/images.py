"""Actions that build images, and remove what building leaves."""

import shutil
from pathlib import Path

from vmtasks.host import files, progress
from vmtasks.images.reader import Reader
from vmtasks.images.steps import Builder
from vmtasks.tasks.context import CONFIG
from vmtasks.tasks.images import nodes


def run_step(name: str, /, *arguments: int, **options: bool) -> None:
    """Run the build step of this name; see images.steps.Builder."""
    try:
        getattr(Builder(CONFIG), name)(*arguments, **options)
    finally:
        nodes.cache_clear()


def clean_phases() -> None:
    """Remove rendered phases, phase ISOs, disk copies, and temporary files of killed runs."""
    state = Reader(CONFIG)
    removed = 0
    for number in state.numbers:
        for path in (state.folder(number), state.iso(number), state.look_disk(number)):
            removed += _remove(path)
        for path in (state.render_file(number), state.iso_file(number)):
            path.unlink(missing_ok=True)
    for path in files.abandoned(state.home):
        removed += _remove(path)
    progress.say(f"clean_phases: {removed} removed below {state.home}")


def _remove(path: Path) -> int:
    if path.is_dir():
        shutil.rmtree(path)
        return 1
    existed = path.exists()
    path.unlink(missing_ok=True)
    return int(existed)
