"""Disk images: create, overlay, inspect, check, flatten. Owns qemu-img."""

import json
from pathlib import Path
from typing import Any

from vmtasks.errors import CommandError, ImageError
from vmtasks.host import files
from vmtasks.host.process import run

QUICK_S = 60.0
COPY_S = 3600.0
DAMAGED = (2, 3)
"""Exit statuses of `qemu-img check` for errors and leaked clusters; see qemu-img(1)."""


def create(path: Path, size: int) -> None:
    """Create an empty qcow2 of `size` bytes at `path`; the file must not exist."""
    _img("create", "-q", "-f", "qcow2", path, str(size), fresh=path)


def overlay(path: Path, backing: Path, *, relative: bool = False, size: int = 0) -> None:
    """Create a qcow2 at `path` with the backing file `backing`; the file must not exist.

    `relative` uses a relative name for the backing file in the same folder. `size` in bytes, if larger than backing's.
    """
    name = backing.name if relative else str(backing.absolute())
    sizes = [str(size)] if size else []
    _img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", name, path, *sizes, fresh=path)


def info(path: Path) -> dict[str, Any]:
    """The output of `qemu-img info`: virtual-size and actual-size in bytes, backing-filename if any."""
    data = json.loads(_img("info", "--output=json", "-U", path))
    if not isinstance(data, dict):
        raise ImageError(f"{path}: qemu-img info gave no object")
    return data


def check(path: Path) -> None:
    """ImageError unless the qcow2 structure is intact."""
    try:
        run(["qemu-img", "check", "-q", "-f", "qcow2", path], timeout_s=COPY_S)
    except CommandError as error:
        if error.status in DAMAGED:
            raise ImageError(f"{path}: the image is damaged: {error.message}") from None
        raise ImageError(f"{path}: the image cannot be checked: {error.stderr.strip() or error.message}") from None


def reback(path: Path, backing: Path) -> None:
    """Change only the name of the backing file, to an absolute path: for a moved image."""
    _img("rebase", "-q", "-u", "-F", "qcow2", "-b", str(backing.absolute()), path)


def flatten(source: Path, target: Path) -> None:
    """Copy `source` into a new image without a backing file; `target` appears only when complete."""
    with files.temporary(target, folder=True) as place:
        beside = place / "disk"
        _img("convert", "-q", "-O", "qcow2", source, beside, timeout_s=COPY_S)
        files.publish(beside, target, 0o444)


def _img(command: str, *words: str | Path, fresh: Path | None = None, timeout_s: float = QUICK_S) -> str:
    """Run qemu-img. `fresh` is a file that it creates: an error if it exists, removed on failure."""
    if fresh is not None:
        if fresh.exists():
            raise ImageError(f"{fresh} exists already")
        fresh.parent.mkdir(parents=True, exist_ok=True)
    try:
        return run(["qemu-img", command, *words], timeout_s=timeout_s).stdout
    except CommandError as error:
        if fresh is not None:
            fresh.unlink(missing_ok=True)
        raise ImageError(f"qemu-img {command}: {error.stderr.strip() or error.message}") from None
