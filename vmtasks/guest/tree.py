"""The files that a sync would send, and a digest that changes when any of them does."""

import errno
import hashlib
import io
import json
import marshal
import os
import stat
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from vmtasks.errors import StateError, VmTasksError
from vmtasks.guest.exclude import excluder
from vmtasks.guest.gitignore import FILE, IgnoreRules, parse
from vmtasks.host import files, process

SETTLED_NS = 2_000_000_000
"""A file unchanged for this long is identified by its timestamps."""
GIT_S = 120.0
WHOLE, FILES = 0, 1
"""The lines of the cache."""
END_OF_NAMES = b"\0\0"
KIND, FOLDER = 0o170000, stat.S_IFDIR
"""The file type bits of a mode, and their value for a folder: S_IFMT and S_IFDIR."""


class Hidden(Protocol):
    """The private places that never go into a guest; see vmtasks.images.private."""

    @property
    def places(self) -> Collection[tuple[int, int]]:
        """Device and inode of each known private place."""

    def looks_private(self, folder: bytes, names: Collection[bytes]) -> bool:
        """Whether a folder with these `names` in it looks like a private place."""

    def private_names(self, folder: bytes, names: Collection[bytes]) -> Collection[bytes]:
        """The names of private places in a folder, whether or not they exist."""


class Repository:
    """A git work tree: the paths that git tracks although a `.gitignore` matches them."""

    def __init__(self, base: bytes, folder: bytes) -> None:
        """`folder` is the walk's root, or a repository inside it at the relative path `base` (ends in `/`)."""
        self.base = base
        self.folder = folder
        self._querying: threading.Thread | None = None
        self._tracked: frozenset[bytes] | None = None

    def start_query(self) -> None:
        """Start git in the background while the tree is walked."""
        if self._querying is None:
            self._querying = threading.Thread(target=self._query, name="git ls-files", daemon=True)
            self._querying.start()

    def tracks(self, path: bytes) -> bool:
        """Whether git tracks a path, or anything in a folder (ends in `/`). True if git fails."""
        return self.tracked is None or path in self.tracked

    @cached_property
    def tracked(self) -> frozenset[bytes] | None:
        """These paths, and the folders above them; None if git fails."""
        self.start_query()
        if self._querying is not None:
            self._querying.join()
        return self._tracked

    def _query(self) -> None:
        words = ["git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-C", os.fsdecode(self.folder)]
        words += ["ls-files", "-z", "-c", "-i", "--exclude-per-directory=.gitignore"]
        try:
            said = os.fsencode(process.run(words, timeout_s=GIT_S).stdout)
        except VmTasksError:
            return
        found: set[bytes] = set()
        for name in said.split(b"\0")[:-1]:
            path = self.base + name
            found.add(path)
            while b"/" in path.rstrip(b"/"):
                path = path.rstrip(b"/").rpartition(b"/")[0] + b"/"
                found.add(path)
        self._tracked = frozenset(found)


_Folder = tuple[bytes, bytes, IgnoreRules | None, Repository | None, bool]
"""Name in the tree (ends in `/`), path, rules and repository in effect, and whether `.gitignore` matches it."""
_Entry = tuple[bytes, os.stat_result]
"""Name in the tree and lstat."""
_Ignored = tuple[bytes, _Entry, IgnoreRules | None, Repository]
"""Name (a folder ends in `/`), the entry, and the rules and repository in effect: ignored unless git tracks it."""


class Walk:
    """A walk over a tree. Iterating yields the entries to send: name and lstat of each, folders before their contents.

    Tracked files that `.gitignore` matches come last: git runs while all else is walked. Afterwards `hidden` holds the
    private paths that never go into a guest, `ignored` the paths that `.gitignore` matches and git does not track
    (relative, folders end in `/`), and ignores() answers for other paths. Entries that vanish meanwhile are skipped.
    StateError for an unreadable entry.
    """

    def __init__(
        self, source: Path, exclude: Sequence[str] = (), *, gitignore: bool = False, hidden: Hidden | None = None
    ) -> None:
        """`exclude` holds rsync patterns."""
        self.root = os.path.realpath(os.fsencode(source))
        self.excluder = excluder(exclude)
        self.gitignore = gitignore
        self.private = hidden
        self.lead = b""
        self.hidden: list[bytes] = []
        self.ignored: list[bytes] = []
        self.rules: dict[bytes, IgnoreRules | None] = {}
        self.repositories: list[Repository] = []

    def __iter__(self) -> Iterator[_Entry]:
        """Walk the tree, sorted, so that two walks of one tree give the same."""
        for entries in self.by_folder():
            yield from entries

    def by_folder(self) -> Iterator[list[_Entry]]:
        """Walk the tree and yield the entries of one folder at a time, which costs a third less."""
        self.hidden, self.ignored, self.rules, self.repositories, self.lead = [], [], {}, [], b""
        rules, repository = self._enclosing_rules() if self.gitignore else (None, None)
        folders: list[_Folder] = [(b"", self.root, rules, repository, False)]
        undecided: list[_Ignored] = []
        while folders or undecided:
            if folders:
                below: list[_Folder] = []
                yield self._scan_folder(folders.pop(), below, undecided)
                folders += reversed(below)
                continue
            tracked, undecided = list(self._tracked(undecided)), []
            yield [entry for _, entry, _, _ in tracked]
            for path, (name, _), rules, repository in reversed(tracked):
                if path.endswith(b"/"):
                    folders.append((path, self.root + b"/" + name, rules, repository, True))

    def _scan_folder(self, folder: _Folder, below: list[_Folder], undecided: list[_Ignored]) -> list[_Entry]:
        """List one folder. Adds its folders to `below`, and `.gitignore` matches to `undecided` until git answers."""
        base, place, rules, repository, inside = folder
        names = _list(place)
        if base and self.private is not None and self.private.looks_private(place, names):
            self.hidden.append(base)
            return []
        hidden = self.private.private_names(place, names) if self.private is not None else ()
        self.hidden += [base + name + b"/" for name in hidden]
        if self.gitignore:
            rules, repository = self._enter(base, place, names, rules, repository)
        in_repository = self.lead + base
        candidates = rules.candidates(in_repository, names) if rules is not None else ()
        infos = _stat(place, names)
        plain = not self.excluder.runs and self.excluder.whole and not inside
        # Most entries are regular files, and there may be many: only the others are checked one by one.
        odd = {*candidates, *hidden} if plain else set(infos)
        odd.update([name for name, info in infos.items() if info.st_mode & KIND == FOLDER or info.st_nlink > 1])
        found = [(base + name, info) for name, info in infos.items() if name not in odd]
        for name in sorted(odd.intersection(infos)):
            path, info = base + name, infos[name]
            end = b"/" if info.st_mode & KIND == FOLDER else b""
            if (end or info.st_nlink > 1) and self._is_private(info):
                self.hidden.append(path + end)
                continue
            said = self.excluder.excludes(path + end)
            if said or name in hidden:
                continue
            named = said is None and (
                inside
                or (rules is not None and name in candidates and rules.ignores(in_repository, name, folder=end != b""))
            )
            if named and repository is not None:
                undecided.append((path + end, (path, info), rules, repository))
                continue
            found.append((path, info))
            if end:
                below.append((path + end, place + b"/" + name, rules, repository, named))
        return sorted(found, key=itemgetter(0)) if odd else found

    def _is_private(self, info: os.stat_result) -> bool:
        return self.private is not None and (info.st_dev, info.st_ino) in self.private.places

    def _tracked(self, undecided: "list[_Ignored]") -> "Iterator[_Ignored]":
        """Yield the matches of `.gitignore` that git tracks; record the others as ignored."""
        for item in undecided:
            path, _, _, repository = item
            if repository.tracks(path):
                yield item
            else:
                self.ignored.append(path)

    def ignores(self, path: bytes) -> bool:
        """Whether `.gitignore` matches a path in the guest (a folder ends in `/`), and git does not track it."""
        rules, base = None, b""
        parts = path.removesuffix(b"/").split(b"/")
        for number, part in enumerate(parts, 1):
            rules = self.rules.get(base, rules)
            folder = number < len(parts) or path.endswith(b"/")
            if rules is not None and rules.ignores(self.lead + base, part, folder=folder):
                return not any(path in (repository.tracked or ()) for repository in self.repositories)
            base += part + b"/"
        return False

    def _enter(
        self,
        base: bytes,
        folder: bytes,
        names: Collection[bytes],
        rules: IgnoreRules | None,
        repository: "Repository | None",
    ) -> tuple[IgnoreRules | None, "Repository | None"]:
        """The rules and repository in effect in a folder. A nested repository does not inherit the outer rules."""
        if b".git" in names and base:
            rules, repository = None, Repository(base, folder)
            self.repositories.append(repository)
        if FILE in names:
            rules = parse(_text(folder + b"/" + FILE), self.lead + base, rules)
        self.rules[base] = rules
        if rules is not None and repository is not None:
            repository.start_query()
        return rules, repository

    def _enclosing_rules(self) -> tuple[IgnoreRules | None, "Repository | None"]:
        """The rules and repository that enclose the tree; None if the repository ignores the tree."""
        top = root = self.root
        while not os.path.lexists(top + b"/.git"):
            if top == b"/":
                return None, None
            top = os.path.dirname(top)  # noqa: PTH120 - bytes
        rules, base = None, b""
        for part in os.path.relpath(root, top).split(b"/") if root != top else ():
            rules = parse(_text(top + b"/" + base + FILE), base, rules)
            if rules is not None and rules.ignores(base, part, folder=True):
                return None, None
            base += part + b"/"
        self.lead = base
        repository = Repository(b"", root)
        self.repositories.append(repository)
        return rules, repository


def tree_digest(walk: Walk, cache: Path | None = None, *, keep: bool = True) -> str:
    """SHA-256 over names, types, modes, link targets and contents of the tree that sync() would send.

    `cache` keeps content digests by size, timestamps and inode, so that only changed files are read. Files changed just
    now are not cached: a second change in the same clock tick would go unnoticed. Without `keep` nothing is written.
    """
    looks = list(_pack_folders(walk))
    stamp = hashlib.sha256(b"".join(looks)).hexdigest()
    settled_ns = time.time_ns() - SETTLED_NS
    whole = _read_cache(cache, WHOLE)
    if whole.get("stamp") == stamp and isinstance(same := whole.get("digest"), str):
        return same
    known, seen, settled = _read_cache(cache, FILES), {}, True
    digest = hashlib.sha256()
    for name, (mode, size, mtime_ns, ctime_ns, inode) in chain.from_iterable(map(_unpack_folder, looks)):
        content, path = "", walk.root + b"/" + name
        if stat.S_ISREG(mode):
            key = f"{size} {mtime_ns} {ctime_ns} {inode} "
            text = name.decode(errors="surrogateescape")
            old = known.get(text)
            content = old[len(key) :] if isinstance(old, str) and old.startswith(key) else _sha256(path)
            if ctime_ns < settled_ns:
                seen[text] = key + content
        elif stat.S_ISLNK(mode):
            content = _target(path)
        settled = settled and (ctime_ns < settled_ns or stat.S_ISDIR(mode))
        # No link target contains a NUL either.
        digest.update(b"%b\0%o %b\0" % (name, mode, content.encode(errors="surrogateescape")))
    if cache is not None and keep and (settled or seen != known):
        whole = {"stamp": stamp, "digest": digest.hexdigest()} if settled else {}
        with suppress(OSError):  # without a cache all files are read again
            files.write(cache, f"{json.dumps(whole)}\n{json.dumps(seen)}\n")
    return digest.hexdigest()


def _pack_folders(walk: Walk) -> Iterator[bytes]:
    """Yield the entries of one folder at a time, packed: 50,000 files as objects would cost more time than the walk.

    First the names, none of which contains a NUL, then mode, size in bytes, mtime, ctime and inode of each; of folders
    only the mode.
    """
    for entries in walk.by_folder():
        if entries:
            facts = [
                (info.st_mode, 0, 0, 0, 0)
                if info.st_mode & KIND == FOLDER
                else (info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
                for _, info in entries
            ]
            yield b"\0".join([name for name, _ in entries]) + END_OF_NAMES + marshal.dumps(facts, 2)


def _unpack_folder(look: bytes) -> Iterator[tuple[bytes, tuple[int, int, int, int, int]]]:
    """Unpack a folder: each name with its stat values."""
    names, _, facts = look.partition(END_OF_NAMES)
    return zip(names.split(b"\0"), marshal.loads(facts), strict=True)  # noqa: S302 - our own data, from this process


def _list(folder: bytes) -> list[bytes]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - bytes
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error) from error


def _stat(folder: bytes, names: Sequence[bytes]) -> dict[bytes, os.stat_result]:
    """Call lstat for each name still in the folder, through its descriptor, which is faster than whole paths."""
    if not names:
        return {}
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        return {name: os.lstat(name, dir_fd=place) for name in names}
    except FileNotFoundError:
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = os.lstat(name, dir_fd=place)
        return found
    finally:
        os.close(place)


def _sha256(path: bytes) -> str:
    """The SHA-256 of the file's content; '' if the file has vanished."""
    try:
        return files.sha256(path)
    except (FileNotFoundError, IsADirectoryError):
        return ""
    except OSError as error:
        raise _unreadable(error) from error


def _target(path: bytes) -> str:
    try:
        return os.fsdecode(os.readlink(path))  # noqa: PTH115 - bytes
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # it has vanished, or is no longer a link
            return ""
        raise _unreadable(error) from error


def _text(path: bytes) -> bytes:
    """The text of a `.gitignore`; like git, does not follow a symbolic link."""
    try:
        with files.opened(path, follow=False) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return b""
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return b""
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> StateError:
    where = os.fsdecode(error.filename or b"the tree")
    return StateError(f"{where}: cannot be read: {error.strerror}", hint="make it readable, or name it in sync.exclude")


def _read_cache(cache: Path | None, line: int) -> dict[str, object]:
    """A line of the cache: a stamp with the tree's digest, or an entry for each file. {} if damaged."""
    try:
        with files.opened(cache) if cache is not None else io.BytesIO() as lines:
            data = json.loads(next(islice(lines, line, None), "{}"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
