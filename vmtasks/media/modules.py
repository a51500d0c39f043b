"""Linux kernel modules: which depend on which, as the .ko files themselves say, and the order to load them in."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from vmtasks.errors import ImageError
from vmtasks.media.tree import Entry

SUFFIX = ".ko"
DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def name(path: str) -> str:
    """The module's name for a path or a spelling of it: the kernel takes `-` and `_` for the same."""
    return PurePosixPath(path).name.removesuffix(SUFFIX).replace("-", "_")


def is_module(entry: Entry) -> bool:
    """Whether an entry is a kernel module."""
    return entry.kind == "file" and entry.path.endswith(SUFFIX)


def depends(data: bytes) -> list[str]:
    """What a module says that it needs: the `depends=` line among the zero-terminated ones of its .modinfo."""
    found = DEPENDS.search(data)
    if found is None:
        raise ImageError("a kernel module has no depends= line: is it compressed?")
    return [name(word) for word in found[1].decode("ascii").split(",") if word]


class Modules:
    """The modules of one tree."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Read `modules.builtin` too: what is built into the kernel needs no file."""
        self._files: dict[str, Entry] = {}
        self._builtin: set[str] = set()
        for entry in entries:
            if is_module(entry):
                self._files[name(entry.path)] = entry
            elif entry.path.endswith("/modules.builtin"):
                self._builtin = {name(line) for line in entry.read().decode().splitlines()}
        self._needs: dict[str, list[str]] = {}

    def needs(self, module: str) -> list[str]:
        """Direct dependencies of `module`."""
        if module not in self._needs:
            self._needs[module] = depends(self._files[module].read())
        return self._needs[module]

    def order(self, roots: Iterable[str]) -> list[Entry]:
        """Files of `roots` and their dependencies, each after what it needs, otherwise in the order asked for.

        What is built into the kernel is passed over. ImageError for a module that the tree has not.
        """
        ordered: dict[str, Entry] = {}

        def visit(module: str, chain: tuple[str, ...]) -> None:
            if module in ordered or module in self._builtin:
                return
            if module in chain:
                raise ImageError(f"kernel modules depend on each other: {' -> '.join((*chain, module))}")
            if module not in self._files:
                because = f", which {chain[-1]} needs" if chain else ""
                raise ImageError(f"there is no kernel module {module}{because}", hint="check `modules` and the kernel")
            for needed in self.needs(module):
                visit(needed, (*chain, module))
            ordered[module] = self._files[module]

        for root in roots:
            visit(name(root), ())
        return list(ordered.values())

    def listing(self, kept: Iterable[Entry]) -> list[Entry]:
        """`modules.dep` for the kept modules, as modprobe reads it: what is needed directly comes first."""
        lines: dict[str, list[str]] = {}
        for entry in sorted(kept, key=lambda entry: entry.path):
            base, _, rest = entry.path.partition("/kernel/")
            needed = reversed(self.order([entry.path])[:-1])
            paths = " ".join(other.path.removeprefix(f"{base}/") for other in needed)
            lines.setdefault(base, []).append(f"kernel/{rest}: {paths}".rstrip(" "))
        return [
            Entry(f"{base}/modules.dep", "file", data="".join(f"{line}\n" for line in text).encode())
            for base, text in lines.items()
        ]
