"""Which files a sync would send, and one digest that tells whether any of them has changed."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmtasks import atomic


def excluder(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """An expression for the paths (folders end in `/`) that simple rsync patterns exclude.

    Patterns with `**`, classes or escapes are left out: a digest that sees too much only runs a suite once more.
    """
    parts = []
    for pattern in patterns:
        if "**" in pattern or "[" in pattern or "\\" in pattern or pattern.startswith(("+ ", "- ")):
            continue
        body = "".join("[^/]*" if c == "*" else "[^/]" if c == "?" else re.escape(c) for c in pattern.strip("/"))
        start = "^" if pattern.startswith("/") else "(?:^|.*/)"
        parts.append(f"{start}{body}{'/' if pattern.endswith('/') else '/?'}$")
    return re.compile("|".join(parts)) if parts else None


def tree_digest(source: Path, exclude: Sequence[str], cache: Path | None = None) -> str:
    """SHA-256 over names, modes, link targets and contents of the tree that sync() would send.

    `cache` remembers contents by size, time and inode, so that only changed files are read.
    """
    known = _load(cache)
    seen: dict[str, list[object]] = {}
    digest = hashlib.sha256()
    for name, path in _walk(source, excluder(exclude)):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            content = "link " + str(path.readlink())
        elif stat.S_ISREG(info.st_mode):
            key = [info.st_size, info.st_mtime_ns, info.st_ino]
            old = known.get(name)
            content = str(old[3]) if old and old[:3] == key else _sha256(path)
            seen[name] = [*key, content]
        else:
            content = "other"
        digest.update(json.dumps([name, stat.S_IMODE(info.st_mode), content]).encode())
    if cache is not None and seen != known:
        atomic.write(cache, json.dumps(seen))
    return digest.hexdigest()


def _walk(source: Path, excluded: re.Pattern[str] | None) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(source):
        base = os.path.relpath(folder, source)
        prefix = "" if base == "." else base + "/"
        folders[:] = sorted(f for f in folders if not (excluded and excluded.match(f"{prefix}{f}/")))
        for name in sorted([*files, *folders]):
            if not (excluded and excluded.match(prefix + name)):
                yield prefix + name, Path(folder) / name


def _load(cache: Path | None) -> dict[str, list[object]]:
    try:
        data = json.loads(cache.read_text()) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
