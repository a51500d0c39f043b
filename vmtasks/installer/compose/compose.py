"""A recipe and an overlay -> an installer CD of packages, initramfs and loader."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmtasks.config.recipe import Recipe
from vmtasks.errors import ImageError
from vmtasks.host import files
from vmtasks.installer.compose import cpio, debian
from vmtasks.installer.compose.modules import Modules, is_module
from vmtasks.installer.compose.unpack import unpack
from vmtasks.media import iso, tree
from vmtasks.media.tree import Entry

LOAD_LIST = "etc/modules"
"""In the initramfs: the paths of the modules, one per line, in the order to load them."""


@dataclass(frozen=True)
class Composed:
    """What was written: digest and size (bytes) of the ISO, and the packages that it was made from."""

    sha256: str
    size: int
    packages: tuple[debian.Package, ...]


def compose(
    recipe: Recipe, guest_dir: Path, cache: Path, out: Path, *, archive: debian.Archive | None = None
) -> Composed:
    """Write the installer CD of `recipe` to `out`.

    `cache` keeps lists, packages and their contents for the next time. Same packages and overlay files: same bytes, on
    any host. FetchError when packages cannot be fetched, ImageError when the recipe does not fit them.
    """
    apt = debian.Apt(cache, archive or archive_of(recipe))
    packages = debian.resolve(apt.index(), recipe.packages, recipe.omit)
    contents = [
        unpack(deb, package.sha256, cache) for package, deb in zip(packages, apt.download(packages), strict=True)
    ]
    write(recipe, guest_dir, contents, out)
    return Composed(files.sha256(out), out.stat().st_size, tuple(packages))


def local_packages(
    recipe: Recipe, names: Sequence[str], cache: Path, *, archive: debian.Archive | None = None
) -> list[Path]:
    """The .deb files that a phase carries to add `names`, and their dependencies, to a guest made by `recipe`.

    What the installer brings already, and what the recipe omits, is left out. The files keep Debian's names.
    """
    apt = debian.Apt(cache, archive or archive_of(recipe))
    index = apt.index()
    present = {package.name for package in debian.resolve(index, recipe.packages, recipe.omit)}
    return apt.download(debian.resolve(index, names, present.union(recipe.omit)))


def archive_of(recipe: Recipe) -> debian.Archive:
    """The archive of the recipe's packages, or the one that the environment names."""
    return debian.Archive(recipe.mirror, recipe.suite, recipe.security).here()


def write(recipe: Recipe, guest_dir: Path, contents: Sequence[Sequence[Entry]], out: Path) -> None:
    """Write the CD from the packages' contents; no network, no apt."""
    names = [entry for group in recipe.links for entry in tree.links(group.target, group.folder, group.names)]
    overlay = tree.overlay(guest_dir / recipe.files) if recipe.files else []
    brought = tree.merge(names, *contents)
    whole = tree.merge(brought, overlay)
    modules = Modules(whole)
    root = tree.chmod(tree.merge(_root(recipe, brought, modules), overlay), recipe.modes)
    first = Entry(tree.clean(recipe.initramfs.path), "file", data=_initramfs(recipe, guest_dir, whole, modules))
    copies = [_copy(whole, path, glob) for path, glob in sorted(recipe.iso.copy.items())]
    boot = iso.Boot(tree.clean(recipe.iso.boot), tree.clean(recipe.iso.catalog))
    iso.write_iso(out, tree.merge(root, [first], copies), label=recipe.iso.label, boot=boot)


def _root(recipe: Recipe, brought: list[Entry], modules: Modules) -> list[Entry]:
    """The packages' files without what the recipe drops, and with the kernel modules that it names only."""
    kept = modules.order(recipe.modules)
    plain = [entry for entry in tree.drop(brought, recipe.drop) if not is_module(entry)]
    return tree.merge(plain, kept, modules.listing(kept))


def _initramfs(recipe: Recipe, guest_dir: Path, whole: list[Entry], modules: Modules) -> bytes:
    wanted = modules.order(recipe.initramfs.modules)
    loads = "".join(f"/{entry.path}\n" for entry in wanted)
    taken = [entry for glob in recipe.initramfs.take for entry in tree.select(whole, glob)]
    overlay = tree.overlay(guest_dir / recipe.initramfs.files) if recipe.initramfs.files else []
    return cpio.archive(tree.merge(taken, wanted, [Entry(LOAD_LIST, "file", data=loads.encode())], overlay))


def _copy(whole: list[Entry], path: str, glob: str) -> Entry:
    """The one file that `glob` matches, under a name of the CD's own."""
    found = [entry for entry in tree.select(whole, glob) if entry.kind == "file"]
    if len(found) != 1:
        names = ", ".join(entry.path for entry in found) or "links only"
        raise ImageError(f"{glob!r}, to be {path} on the CD, must match one file and matches: {names}")
    return msgspec.structs.replace(found[0], path=tree.clean(path))
