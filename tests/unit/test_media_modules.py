import gzip
import lzma
import shutil
import subprocess

import msgspec
import pytest

from vmtasks.errors import ImageError
from vmtasks.installer.compose.modules import Modules, depends, is_module
from vmtasks.media.tree import Entry

BASE = "lib/modules/6.1/kernel"


def module(path, needs=""):
    return Entry(f"{BASE}/{path}.ko", "file", data=f"\x7fELF\0license=GPL\0depends={needs}\0name=x\0".encode())


TREE = [
    module("drivers/virtio_scsi", "virtio,scsi_mod"),
    module("drivers/virtio", "virtio-ring"),
    module("drivers/virtio_ring"),
    module("drivers/scsi_mod", "scsi_common"),
    module("drivers/scsi_common"),
    module("drivers/sr-mod", "scsi_mod"),
    module("fs/loose"),
    Entry("lib/modules/6.1/modules.builtin", "file", data=b"kernel/fs/ext4/ext4.ko\n"),
]


def names(entries):
    return [entry.path.removeprefix(f"{BASE}/").removesuffix(".ko") for entry in entries]


def test_each_comes_after_what_it_needs():
    assert names(Modules(TREE).order(["sr_mod", "ext4", "virtio_scsi"])) == [
        "drivers/scsi_common",
        "drivers/scsi_mod",
        "drivers/sr-mod",
        "drivers/virtio_ring",
        "drivers/virtio",
        "drivers/virtio_scsi",
    ]


def test_unknown_and_circular():
    with pytest.raises(ImageError, match="no kernel module absent, which a needs"):
        Modules([module("a", "absent")]).order(["a"])
    with pytest.raises(ImageError, match="a -> b -> a"):
        Modules([module("a", "b"), module("b", "a")]).order(["a"])


def test_listing_as_depmod_writes_it():
    known = Modules(TREE)
    (listing,) = known.listing(known.order(["virtio_scsi"]))
    assert listing.path == "lib/modules/6.1/modules.dep"
    lines = listing.read().decode().splitlines()
    assert "kernel/drivers/virtio_ring.ko:" in lines
    assert (
        "kernel/drivers/virtio_scsi.ko: kernel/drivers/scsi_mod.ko kernel/drivers/scsi_common.ko "
        "kernel/drivers/virtio.ko kernel/drivers/virtio_ring.ko"
    ) in lines


def zstd(data):
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


PACKINGS = {"gz": gzip.compress, "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32), "zst": zstd}


@pytest.mark.parametrize("base", ["lib/modules/6.1", "usr/lib/modules/6.12.1+deb13-amd64"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_compressed_modules_are_unpacked_wherever_they_are(base, packing):
    """As Debian 13 and others have them."""
    if packing == "zst" and not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    there = [msgspec.structs.replace(entry, path=entry.path.replace("lib/modules/6.1", base)) for entry in TREE]
    packed = [
        msgspec.structs.replace(entry, path=f"{entry.path}.{packing}", data=PACKINGS[packing](entry.data))
        if is_module(entry)
        else entry
        for entry in there
    ]
    known = Modules(packed)
    found = known.order(["sr_mod", "ext4", "virtio_scsi"])
    assert found == Modules(there).order(["sr_mod", "ext4", "virtio_scsi"])
    assert known.listing(found) == Modules(there).listing(found)
    assert all(is_module(entry) for entry in packed if "builtin" not in entry.path)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_module_that_cannot_be_unpacked_is_named(packing):
    if packing == "zst" and not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    entry = Entry(f"{BASE}/odd.ko.{packing}", "file", data=b"\x7fELF")
    with pytest.raises(ImageError, match=rf"odd\.ko\.{packing}"):
        Modules([entry]).order(["odd"])


def test_what_is_no_module_is_named():
    with pytest.raises(ImageError, match=r"odd\.ko has no depends= line"):
        depends(Entry(f"{BASE}/odd.ko", "file", data=b"\xfd7zXZ"))
