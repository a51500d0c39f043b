"""The made-up installer CD: an overlay put together from standin/, composed by the project, named as a release is.

Also the small CD by which a test tells one boot what is to fail there.
"""

import bz2
import hashlib
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmtasks.config.recipe import Recipe
from vmtasks.installer.compose import compose, debian
from vmtasks.installer.compose.unpack import unpack
from vmtasks.media.iso import write_iso
from vmtasks.media.tree import Entry

HERE = Path(__file__).parent
STANDIN = HERE / "standin"
RECORDER = "/usr/libexec/standin/record"
NAME = "dfly-x86_64-6.4.2_REL.iso.bz2"

OPENSSH = {"usr/bin/ssh", "usr/bin/ssh-keygen", "usr/sbin/sshd"}
"""Real programs whose place is that of a link to the recorder; a composed tree has room for one of them."""

BUSYBOX = [
    "[", "[[", "acpid", "ash", "awk", "basename", "blockdev", "cat", "chgrp", "chmod", "chown", "chroot", "cmp",
    "cp", "cut", "date", "dd", "df", "dirname", "dmesg", "du", "echo", "ed", "egrep", "env", "expr", "false",
    "fgrep", "find", "fsync", "getty", "grep", "head", "hexdump", "hostname", "id", "ifconfig", "init", "insmod",
    "install", "ip", "kill", "klogd", "ln", "logger", "login", "losetup", "ls", "mkdir", "mkfifo", "mknod",
    "mktemp", "more", "mount", "mv", "nc", "nohup", "od", "passwd", "ping", "poweroff", "printf", "ps", "pwd",
    "readlink", "realpath", "reboot", "rm", "rmdir", "route", "sed", "seq", "setsid", "sh", "sleep", "sort", "stat",
    "stty", "su", "switch_root", "sync", "tac", "tail", "tar", "tee", "test", "timeout", "touch", "tr", "true",
    "tty", "udhcpc", "umount", "uname", "uniq", "unlink", "vi", "wc", "which", "who", "xargs", "yes",
]  # fmt: skip


@dataclass(frozen=True)
class Release:
    """A published installer: `packed` as a mirror serves it, and the digests that guest.toml has of such a file."""

    packed: bytes
    digests: tuple[str, ...]


def compose_iso(cache: Path, work: Path, out: Path, *, manner: str = "") -> Path:
    """Compose the installer CD to `out`; `work` is an absent folder.

    `manner` gives the loader vices: see loader.lua.
    """
    put_together(work, manner)
    recipe = msgspec.convert(tomllib.loads((STANDIN / "installer.toml").read_text()), Recipe)
    apt = debian.Apt(cache, compose.archive_of(recipe))
    packages = debian.resolve(apt.index(), recipe.packages, recipe.omit)
    debs = zip(packages, apt.download(packages), strict=True)
    contents = [unpack(deb, package.sha256, cache) for package, deb in debs]
    for entry in (entry for content in contents for entry in content):
        if entry.path in OPENSSH:
            tool = work / "root/usr/libexec/standin/bin" / entry.path.rpartition("/")[2]
            tool.write_bytes(entry.read())
            tool.chmod(0o755)
    compose.write(recipe, work, contents, out)
    return out


def release(iso: Path) -> Release:
    """The CD packed as the project publishes its releases, with its true digests."""
    content = iso.read_bytes()
    packed = bz2.compress(content, 1)
    return Release(
        packed,
        (
            f"md5:{hashlib.md5(packed, usedforsecurity=False).hexdigest()} of download",
            f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()} of content",
            f"sha256:{hashlib.sha256(packed).hexdigest()} of download",
        ),
    )


def put_together(work: Path, manner: str = "") -> None:
    """Write the overlay: the files of standin/, links for the commands, /etc for the live system and for the disk."""
    shutil.copytree(STANDIN / "initramfs", work / "initramfs", symlinks=True)
    root = work / "root"
    shutil.copytree(STANDIN / "root", root, symlinks=True)
    shutil.copytree(STANDIN / "etc.hdd", root / "etc.hdd", symlinks=True)
    shutil.copytree(STANDIN / "etc.hdd", root / "etc", symlinks=True)
    shutil.copytree(STANDIN / "etc.live", root / "etc", symlinks=True, dirs_exist_ok=True)
    for folder in (root / "etc", root / "etc.hdd"):
        databases(folder)
    table = list(commands())
    for folder, name, _ in table:
        place = root / folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(RECORDER)
    cases = "".join(f"        {name}) echo '{options}' ;;\n" for _, name, options in table if options != "-")
    (root / "usr/libexec/standin/options").write_text(
        "# shellcheck shell=sh\n# Made from the table `commands`.\noptions_of() {\n    case $1 in\n"
        f"{cases}        *) echo - ;;\n    esac\n}}\n"
    )
    tools = root / "usr/libexec/standin/bin"
    tools.mkdir(exist_ok=True)
    for name in BUSYBOX:
        (tools / name).symlink_to("busybox")
    (root / "sbin/init").symlink_to("/usr/libexec/standin/bin/busybox")
    if manner:
        (root / "boot/manner").write_text(f"{manner}\n")


def commands() -> Iterator[tuple[str, str, str]]:
    """Folder, name and options of each command that DragonFly's base system has, as far as it is known here."""
    for line in (STANDIN / "commands").read_text().splitlines():
        if line and not line.startswith("#"):
            folder, name, options = line.split()
            yield folder, name, "" if options == "0" else options


def databases(etc: Path) -> None:
    """What pwd_mkdb would have made of master.passwd, and the two files that Linux's libc reads."""
    entries = [line.split(":") for line in (etc / "master.passwd").read_text().splitlines() if not line.startswith("#")]
    plain = [[e[0], "*", e[2], e[3], *e[7:]] for e in entries]
    texts = {
        "passwd": [[e[0], "x", *e[2:]] for e in plain],
        "pwd.db": plain,
        "shadow": [[e[0], e[1], "19000", "0", "99999", "7", "", "", ""] for e in entries],
        "spwd.db": entries,
    }
    for name, lines in texts.items():
        (etc / name).write_text("".join(":".join(line) + "\n" for line in lines))


def fault_iso(out: Path, *, line: str = "", occurrence: int = 1, status: int = 75, pkg: str = "") -> Path:
    """A CD that tells one boot which command fails, from which time on, and how pkg is at first. It has no pfi.conf."""
    entries = [Entry("readme", "file", 0o444, b"What the rehearsal tells this boot.\n")]
    if line:
        entries.append(Entry("fault", "file", 0o444, f"{occurrence}\n{status}\n{line}\n".encode()))
    if pkg:
        entries.append(Entry("pkg", "file", 0o444, f"{pkg}\n".encode()))
    write_iso(out, entries, label="FAULT")
    return out
