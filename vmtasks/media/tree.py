"""A file tree as a list of entries: the form of packages and overlay folders before an image is written."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from vmtasks.errors import ImageError

MODE_FOLDER = 0o755
MODE_PLAIN = 0o644
MODE_PROGRAM = 0o755


class Entry(msgspec.Struct, frozen=True):
    """One path of a tree.

    `path` is relative, with `/` between its parts. `data` has a file's bytes, or names the file that has them. `target`
    is a link's target. All entries belong to root and have no time.
    """

    path: str
    kind: Literal["dir", "file", "link"]
    mode: int = MODE_PLAIN
    data: bytes | Path | Literal[""] = ""
    target: str = ""

    def read(self) -> bytes:
        """The file's bytes; nothing for a folder or a link."""
        return self.data.read_bytes() if isinstance(self.data, Path) else self.data or b""

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.data.stat().st_size if isinstance(self.data, Path) else len(self.data)


def clean(path: str) -> str:
    """`path` without `./`, doubled or outer slashes; ImageError when it leaves its tree."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ImageError(f"{path!r} leads out of its tree")
    return "/".join(parts)


def merge(*layers: Iterable[Entry]) -> list[Entry]:
    """The layers merged, later ones on top, sorted, with every parent folder present.

    A folder over a folder keeps the upper mode. A folder over a link to a folder leaves the link, as dpkg does.
    ImageError if a file is in the place of a folder.
    """
    found: dict[str, Entry] = {}
    for layer in layers:
        for entry in layer:
            if not entry.path:
                continue
            below = found.get(entry.path)
            if entry.kind == "dir" and below is not None and below.kind == "link":
                continue
            found[entry.path] = entry
    for path in list(found):
        for parent in parents(path):
            holder = found.setdefault(parent, Entry(parent, "dir", MODE_FOLDER))
            if holder.kind != "dir":
                raise ImageError(f"{path} needs {parent} to be a folder, and it is a {holder.kind}")
    return sort(found.values())


def parents(path: str) -> Iterator[str]:
    """The parent folders of `path`, the outermost first."""
    parts = path.split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])


def sort(entries: Iterable[Entry]) -> list[Entry]:
    """Sort by path, part by part: a folder comes before its contents."""
    return sorted(entries, key=lambda entry: entry.path.split("/"))


def matcher(glob: str) -> re.Pattern[str]:
    """`*` and `?` match within one part of a path, `**` across parts; a glob also matches everything below a match."""
    words = re.split(r"(\*\*|\*|\?)", clean(glob))
    special = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(special.get(word, re.escape(word)) for word in words) + "(/.*)?", re.DOTALL)


def drop(entries: Iterable[Entry], globs: Sequence[str]) -> list[Entry]:
    """Leave out entries that the globs match; `!GLOB` keeps them; the last match decides.

    Matched folders that become empty are left out too; a folder with a kept entry below it stays.
    """
    rules = [(not glob.startswith("!"), matcher(glob.removeprefix("!"))) for glob in globs]

    def gone(path: str) -> bool:
        return next((verdict for verdict, rule in reversed(rules) if rule.fullmatch(path)), False)

    whole = list(entries)
    kept = [entry for entry in whole if not gone(entry.path)]
    needed = {parent for entry in kept for parent in parents(entry.path)}
    return kept + [entry for entry in whole if entry.kind == "dir" and gone(entry.path) and entry.path in needed]


def select(entries: Iterable[Entry], glob: str) -> list[Entry]:
    """The files and links whose path matches `glob` itself; ImageError when there are none."""
    rule = matcher(glob)
    found = [entry for entry in entries if entry.kind != "dir" and rule.fullmatch(entry.path)]
    if not found:
        raise ImageError(f"nothing in the tree matches {glob!r}")
    return found


def links(target: str, folder: str, names: Iterable[str]) -> list[Entry]:
    """Symbolic links to `target`, one for each name in `folder`."""
    return [Entry(clean(f"{folder}/{name}"), "link", 0o777, target=target) for name in names]


def overlay(folder: Path) -> list[Entry]:
    """A folder of the host as entries.

    Modes do not depend on umask, checkout or package installer: a file that can be executed, or begins with `#!`, is
    0755 and any other 0644. ImageError for a missing folder and for what is neither file, folder nor link.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder")
    return sort(_overlay(folder, ""))


def _overlay(folder: str | Path, above: str) -> Iterator[Entry]:
    """The contents of `folder`; `above` prefixes their names. Strings, not Paths, because doit asks at every run."""
    with os.scandir(folder) as scan:
        for found in scan:
            path = f"{above}{found.name}"
            if found.is_symlink():
                yield Entry(path, "link", 0o777, target=os.readlink(found.path))  # noqa: PTH115
            elif found.is_dir():
                yield Entry(path, "dir", MODE_FOLDER)
                yield from _overlay(found.path, f"{path}/")
            elif found.is_file():
                host = Path(found.path)
                with host.open("rb", buffering=0) as stream:
                    runs = stream.read(2) == b"#!" or bool(found.stat().st_mode & 0o100)
                yield Entry(path, "file", MODE_PROGRAM if runs else MODE_PLAIN, host)
            else:
                raise ImageError(f"{found.path} is neither a file, a folder nor a link")


def chmod(entries: Iterable[Entry], modes: dict[str, str]) -> list[Entry]:
    """Set modes by path, in octal text; `path/` is a folder, made if missing. ImageError for a missing path."""
    found = {entry.path: entry for entry in entries}
    for name, mode in sorted(modes.items()):
        path = clean(name)
        if name.endswith("/"):
            found.setdefault(path, Entry(path, "dir", MODE_FOLDER))
        if path not in found:
            raise ImageError(f"there is no {name} whose mode could be set")
        found[path] = msgspec.structs.replace(found[path], mode=int(mode, 8))
    return merge(found.values())
