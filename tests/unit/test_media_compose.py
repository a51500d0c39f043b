import gzip
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import debs
import msgspec
import pytest

from vmtasks.config.recipe import Recipe
from vmtasks.errors import ImageError
from vmtasks.host import process
from vmtasks.installer.compose import compose
from vmtasks.media.tree import Entry

pytestmark = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("bsdtar") is None, reason="apt and bsdtar are needed"
)

MODULE = b"\x7fELF\0depends=%s\0"
KERNEL = debs.Deb(
    "kernel",
    entries=[
        Entry("boot/vmlinuz-6.1", "file", data=b"kernel"),
        Entry("lib/modules/6.1/kernel/a/one.ko", "file", data=MODULE % b"two"),
        Entry("lib/modules/6.1/kernel/a/two.ko", "file", data=MODULE % b""),
        Entry("lib/modules/6.1/kernel/a/three.ko", "file", data=MODULE % b""),
        Entry("usr/share/doc/kernel/copyright", "file", data=b"text"),
    ],
)
BOX = debs.Deb(
    "box",
    entries=[Entry("bin/box", "file", 0o755, b"box"), Entry("bin/own", "file", 0o755, b"own")],
    fields={"Depends": "base"},
)
LOADER = debs.Deb("loader", entries=[Entry("usr/lib/loader.bin", "file", data=bytes(4096))])
RECIPE = msgspec.convert(
    {
        "source": "packages",
        "packages": ["box", "kernel", "loader"],
        "omit": ["base"],
        "drop": ["boot", "usr"],
        "modules": ["three"],
        "files": "root",
        "modes": {"tmp/": "1777", "etc/secret": "0600"},
        "links": [{"target": "/bin/box", "folder": "bin", "names": ["ls", "own"]}],
        "initramfs": {"path": "boot/initrd.gz", "files": "first", "modules": ["one"], "take": ["bin/box"]},
        "iso": {
            "label": "TEST",
            "boot": "boot/loader.bin",
            "copy": {"boot/kernel": "boot/vmlinuz-*", "boot/loader.bin": "usr/lib/loader.bin"},
        },
    },
    Recipe,
)


@pytest.fixture
def guest(tmp_path):
    for name, text in {"root/etc/secret": "s", "root/boot/menu": "m", "first/init": "#!/bin/box\n"}.items():
        path = tmp_path / "guest" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "guest"


@pytest.fixture
def archive(tmp_path):
    return debs.publish(
        tmp_path / "archive", [KERNEL, BOX, LOADER, debs.Deb("base"), debs.Deb("extra", fields={"Depends": "box"})]
    )


def made(recipe, guest, tmp_path, archive, out="a.iso"):
    return compose.compose(recipe, guest, tmp_path / "cache", tmp_path / out, archive=archive)


def test_cd_holds_what_the_recipe_says(tmp_path, guest, archive):
    composed = made(RECIPE, guest, tmp_path, archive)
    assert [package.name for package in composed.packages] == ["box", "kernel", "loader"]
    assert composed.size == (tmp_path / "a.iso").stat().st_size
    lines = process.run(["bsdtar", "tvf", tmp_path / "a.iso"], timeout_s=10).stdout.splitlines()
    seen = {line.split()[8]: line.split()[0] for line in lines}
    for path in ("boot/kernel", "boot/menu", "boot/loader.bin", "bin/box", "lib/modules/6.1/kernel/a/three.ko"):
        assert path in seen
    for path in ("boot/vmlinuz-6.1", "usr", "lib/modules/6.1/kernel/a/one.ko"):
        assert path not in seen
    assert seen["bin/ls"].startswith("l")
    assert seen["bin/own"] == "-rwxr-xr-x"
    assert seen["etc/secret"] == "-rw-------"
    assert seen["tmp"] == "drwxrwxrwt"


def test_initramfs_lists_modules_in_order(tmp_path, guest, archive):
    made(RECIPE, guest, tmp_path, archive)
    process.run(["bsdtar", "xf", tmp_path / "a.iso", "-C", tmp_path, "boot/initrd.gz"], timeout_s=10)
    raw = gzip.decompress((tmp_path / "boot/initrd.gz").read_bytes())
    assert b"/lib/modules/6.1/kernel/a/two.ko\n/lib/modules/6.1/kernel/a/one.ko\n" in raw
    assert b"three.ko" not in raw


def test_same_bytes_from_an_empty_cache_and_another_umask(tmp_path, guest, archive):
    first = made(RECIPE, guest, tmp_path, archive)
    before = os.umask(0o077)
    try:
        copy = shutil.copytree(guest, tmp_path / "elsewhere")
        second = compose.compose(RECIPE, copy, tmp_path / "other", tmp_path / "b.iso", archive=archive)
    finally:
        os.umask(before)
    assert first == second


def test_phase_packages_leave_out_what_the_guest_has(tmp_path, archive):
    found = compose.local_packages(RECIPE, ["extra", "kernel"], tmp_path / "cache", archive=archive)
    assert [path.name for path in found] == ["extra_1.0_amd64.deb"]


def test_copy_must_match_one_file(tmp_path, guest, archive):
    several = msgspec.structs.replace(RECIPE.iso, copy={"x": "lib/modules/**.ko"})
    with pytest.raises(ImageError, match="must match one file"):
        made(msgspec.structs.replace(RECIPE, iso=several), guest, tmp_path, archive)


def test_other_archive_by_environment(monkeypatch):
    monkeypatch.setenv("VMTASKS_DEBIAN_MIRROR", "http://mirror/debian")
    assert compose.archive_of(RECIPE) == replace(compose.debian.Archive(), mirror="http://mirror/debian")


def test_the_guests_own_recipe_is_valid():
    folder = Path(__file__).parents[2] / "phases/tiny"
    recipe = msgspec.convert(tomllib.loads((folder / "guest.toml").read_text())["installer"], Recipe)
    assert (folder / recipe.files).is_dir()
    assert (folder / recipe.initramfs.files / "init").is_file()
