"""What a guest.toml says about an installer that is composed from packages: frozen values, no behaviour."""

from typing import Annotated

import msgspec

Paths = tuple[str, ...]
Mode = Annotated[str, msgspec.Meta(pattern="^[0-7]{3,4}$", description="permission bits in octal, as chmod takes them")]


def key(description: str) -> msgspec.Meta:
    """The line that documents a key, here and in the JSON schema."""
    return msgspec.Meta(description=description)


class Links(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Many names for one program, each a symbolic link."""

    target: Annotated[str, key("what the links point to, as written into them")]
    folder: Annotated[str, key("folder of the links, relative to the root")]
    names: Annotated[Paths, key("names of the links; what a package or the overlay brings under such a name wins")]


class Initramfs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first file system of the kernel: a newc archive, gzip."""

    path: Annotated[str, key("where the archive stands in the root tree")]
    files: Annotated[str, key("overlay folder, relative to the guest's folder; holds at least `init`")] = ""
    modules: Annotated[Paths, key("kernel modules to load; what they depend on is found, and the order computed")] = ()
    take: Annotated[Paths, key("globs of the root tree's files that are copied in")] = ()


class Iso(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The installer CD: the root tree and what is needed to start it."""

    label: Annotated[str, msgspec.Meta(pattern="^[A-Z0-9_]{1,32}$", description="volume label")]
    boot: Annotated[str, key("El Torito boot image, a path on the CD; it gets a boot information table")]
    catalog: Annotated[str, key("where the boot catalog is shown on the CD")] = "boot.cat"
    copy: Annotated[dict[str, str], key("path in the tree = glob that matches one file that a package brings")] = {}


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="source", tag="packages"):
    """`[installer]` with `source = "packages"`: an installer CD made from distribution packages, without root."""

    packages: Annotated[Paths, key("packages of the root tree; what they depend on comes with them")]
    initramfs: Annotated[Initramfs, key("what the kernel starts first")]
    iso: Annotated[Iso, key("the CD that carries it all")]
    suite: Annotated[str, key("release name; its updates and security updates are used too")] = "bookworm"
    mirror: Annotated[str, key("archive; VMTASKS_DEBIAN_MIRROR overrides it")] = "http://deb.debian.org/debian"
    security: Annotated[str, key("security archive; empty for none")] = "http://deb.debian.org/debian-security"
    omit: Annotated[Paths, key("packages that are not wanted although something depends on them")] = ()
    drop: Annotated[
        Paths,
        key("globs of packaged paths left out of the root tree; `!GLOB` keeps some of them; the last match decides"),
    ] = ()
    files: Annotated[str, key("overlay folder of the root tree, relative to the guest's folder")] = ""
    links: Annotated[tuple[Links, ...], key("symbolic links of the root tree")] = ()
    modules: Annotated[Paths, key("kernel modules of the root tree, with what they depend on; no others are kept")] = ()
    modes: Annotated[dict[str, Mode], key("path = mode; a path that ends in / is a folder, made if absent")] = {}
