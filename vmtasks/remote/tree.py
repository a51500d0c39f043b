"""Which files a sync would send, and one digest that tells whether any of them has changed."""

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmtasks import atomic

SETTLED_NS = 2_000_000_000
"""A file that has not changed for so long is known by its times."""


def excluder(patterns: Sequence[str]) -> re.Pattern[bytes] | None:
    """An expression for the whole paths, as bytes (folders end in `/`), that simple rsync patterns exclude.

    What is not simple is left out, after a `+` also what follows, which it may keep, and what is before a `!`, which
    clears the list. A digest that sees too much only runs a suite once more.
    """
    parts = []
    cleared = max((n for n, pattern in enumerate(patterns, 1) if pattern == "!"), default=0)
    for pattern in map(os.fsencode, patterns[cleared:]):
        if pattern.startswith(b"+ "):
            break
        body = pattern.removeprefix(b"/").removesuffix(b"/")
        if not body or body.startswith((b"/", b"- ", b"!")) or re.search(rb"\*\*|[\[\\]|//|/\Z", body):
            continue
        words = {b"*": b"[^/]*", b"?": b"[^/]"}
        simple = b"".join(words.get(c, re.escape(c)) for c in (body[i : i + 1] for i in range(len(body))))
        start = b"" if pattern.startswith(b"/") else b"(?:.*/)?"
        parts.append(start + simple + rb"(?<!/)" + (b"/" if pattern.endswith(b"/") else b"/?"))
    return re.compile(b"|".join(parts), re.DOTALL) if parts else None


def tree_digest(source: Path, exclude: Sequence[str], cache: Path | None = None) -> str:
    """SHA-256 over names, kinds, modes, link targets and contents of the tree that sync() would send.

    `cache` remembers contents by size, times and inode, so that only changed files are read. What was changed just now
    is not remembered: a second change in the same tick of the clock would not show.
    """
    known = _load(cache)
    seen: dict[str, list[object]] = {}
    settled_ns = time.time_ns() - SETTLED_NS
    digest = hashlib.sha256()
    for name, path in _walk(source, excluder(exclude)):
        info = path.lstat()
        content = ""
        if stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(info.st_mode):
            key = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
            old = known.get(name)
            content = str(old[-1]) if isinstance(old, list) and old[:-1] == key else _sha256(path)
            if info.st_ctime_ns < settled_ns:
                seen[name] = [*key, content]
        digest.update(json.dumps([name, info.st_mode, content]).encode())
    if cache is not None and seen != known:
        atomic.write(cache, json.dumps(seen))
    return digest.hexdigest()


def _walk(source: Path, excluded: re.Pattern[bytes] | None) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(source):
        base = os.path.relpath(folder, source)
        prefix = "" if base == "." else base + "/"

        def kept(name: str, end: str, prefix: str = prefix) -> bool:
            return not (excluded and excluded.fullmatch(os.fsencode(prefix + name + end)))

        links = [f for f in folders if Path(folder, f).is_symlink()]  # a pattern that ends in / does not mean them
        folders[:] = sorted(f for f in folders if f not in links and kept(f, "/"))
        for name in sorted([*folders, *(f for f in [*files, *links] if kept(f, ""))]):
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
