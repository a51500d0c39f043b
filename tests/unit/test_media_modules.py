import pytest

from vmtasks.errors import ImageError
from vmtasks.media.modules import Modules, depends
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


def test_compressed_module():
    with pytest.raises(ImageError, match="compressed"):
        depends(b"\xfd7zXZ")
