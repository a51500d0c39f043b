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
"""How `qemu-img check` exits after it has found errors, or clusters that nothing refers to; see qemu-img(1)."""


def create(path: Path, size: int) -> None:
    """An empty qcow2 of `size` bytes at `path`; the file must not exist."""
    _img("create", "-q", "-f", "qcow2", path, str(size), fresh=path)


def overlay(path: Path, backing: Path, *, relative: bool = False, size: int = 0) -> None:
    """A qcow2 at `path` that holds only what differs from `backing`; the file must not exist.

    `relative` names the backing file relatively: both are in one folder. `size` in bytes, if larger than backing's.
    """
    name = backing.name if relative else str(backing.absolute())
    sizes = [str(size)] if size else []
    _img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", name, path, *sizes, fresh=path)


def info(path: Path) -> dict[str, Any]:
    """What `qemu-img info` says: virtual-size and actual-size in bytes, backing-filename if any."""
    data = json.loads(_img("info", "--output=json", "-U", path))
    if not isinstance(data, dict):
        raise ImageError(f"{path}: qemu-img info gave no object")
    return data


def check(path: Path) -> None:
    """ImageError unless the qcow2 structure is sound."""
    try:
        run(["qemu-img", "check", "-q", "-f", "qcow2", path], timeout_s=COPY_S)
    except CommandError as error:
        if error.status in DAMAGED:
            raise ImageError(f"{path}: the image is damaged: {error.message}") from None
        raise ImageError(f"{path}: the image cannot be checked: {error.stderr.strip() or error.message}") from None


def reback(path: Path, backing: Path) -> None:
    """Change only the name of the backing file, to an absolute path: for an image that was moved."""
    _img("rebase", "-q", "-u", "-F", "qcow2", "-b", str(backing.absolute()), path)


def flatten(source: Path, target: Path) -> None:
    """Copy what `source` shows into a new image that needs no backing file; `target` appears whole."""
    with files.temporary(target, folder=True) as place:
        beside = place / "disk"
        _img("convert", "-q", "-O", "qcow2", source, beside, timeout_s=COPY_S)
        files.publish(beside, target, 0o444)


def _img(command: str, *words: str | Path, fresh: Path | None = None, timeout_s: float = QUICK_S) -> str:
    """Run qemu-img. `fresh` is a file that it makes: refused if there, removed if it fails."""
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
