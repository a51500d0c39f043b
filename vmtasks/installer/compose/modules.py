"""Linux kernel modules: their dependencies, read from the .ko files, and the order to load them in.

Distributions compress them. They are unpacked here, so that the guest's loader need not.
"""

import re
import tempfile
from collections.abc import Iterable
from pathlib import PurePosixPath

import msgspec

from vmtasks.errors import ImageError
from vmtasks.host import process
from vmtasks.installer.download.content import Problem, Unpacker
from vmtasks.media.tree import Entry

MODULE = re.compile(r"(.*\.ko)(?:\.(gz|xz|zst))?", re.DOTALL)
UNPACK_S = 60.0
DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def name(path: str) -> str:
    """The module's name for a path or a spelling of it: the kernel takes `-` and `_` for the same."""
    found = MODULE.fullmatch(path)
    return PurePosixPath(found[1] if found else path).name.removesuffix(".ko").replace("-", "_")


def is_module(entry: Entry) -> bool:
    """Whether an entry is a kernel module."""
    return entry.kind == "file" and MODULE.fullmatch(entry.path) is not None


def plain(entry: Entry) -> Entry:
    """Decompress a module, and its name. ImageError for what cannot be unpacked."""
    found = MODULE.fullmatch(entry.path)
    if found is None or not found[2]:
        return entry
    try:
        data = _unzstd(entry) if found[2] == "zst" else _unpack(entry, found[2])
    except Problem as problem:
        raise ImageError(f"the kernel module {entry.path} {problem}") from None
    return msgspec.structs.replace(entry, path=found[1], data=data)


def _unpack(entry: Entry, packing: str) -> bytes:
    unpacker = Unpacker(packing)
    data = b"".join(unpacker.feed(entry.read()))
    unpacker.finish()
    return data


def _unzstd(entry: Entry) -> bytes:
    """Python reads this format from 3.14 on; the program is a package everywhere."""
    blocks: list[bytes] = []
    said = process.Head()
    with tempfile.TemporaryFile() as packed:
        packed.write(entry.read())
        packed.seek(0)
        ended = process.stream(["zstd", "-dcq"], blocks.append, timeout_s=UNPACK_S, stdin=packed, errors=said)
    if ended.status != 0:
        raise ImageError(f"the kernel module {entry.path}: zstd ended with {ended.status}: {said.text.strip()}")
    return b"".join(blocks)


def depends(entry: Entry) -> list[str]:
    """The modules that a module needs: the `depends=` line among the zero-terminated ones of its .modinfo."""
    found = DEPENDS.search(entry.read())
    if found is None:
        raise ImageError(f"the kernel module {entry.path} has no depends= line: it is no module, or it is compressed")
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
        self._plain: dict[str, Entry] = {}

    def plain(self, module: str) -> Entry:
        """The file of `module`, without compression."""
        if module not in self._plain:
            self._plain[module] = plain(self._files[module])
        return self._plain[module]

    def needs(self, module: str) -> list[str]:
        """Direct dependencies of `module`."""
        if module not in self._needs:
            self._needs[module] = depends(self.plain(module))
        return self._needs[module]

    def order(self, roots: Iterable[str]) -> list[Entry]:
        """Files of `roots` and their dependencies, plain, each after what it needs, otherwise in the order asked for.

        What is built into the kernel is skipped. ImageError for a module that the tree lacks.
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
            ordered[module] = self.plain(module)

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
