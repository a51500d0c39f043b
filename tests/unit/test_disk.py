"""Images made, stacked, moved, copied and damaged, with the real qemu-img."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from vmtasks.errors import ImageError
from vmtasks.media import disk

MIB = 1 << 20
ODD = 'it\'s a "disk", 100% ; $x'


def write(path: Path, data: bytes, at: int = 0) -> None:
    """Put bytes where a guest would."""
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -P {data[0]} {at} {len(data)}", path], capture_output=True, check=False
    )
    assert b"wrote" in done.stdout, done


def read(path: Path, size: int, at: int = 0) -> bytes:
    """What a guest would see."""
    raw = path.with_name("raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()[at : at + size]


@pytest.fixture(params=["plain", ODD])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / request.param
    made.mkdir()
    return made


@pytest.fixture
def base(folder: Path) -> Path:
    path = folder / "base.qcow2"
    disk.create(path, 4 * MIB)
    write(path, b"\x11" * 65536)
    return path


def test_create(folder: Path):
    path = folder / "new" / f"{ODD}.qcow2"
    disk.create(path, 8 << 30)
    found = disk.info(path)
    assert (found["format"], found["virtual-size"]) == ("qcow2", 8 << 30)
    assert path.stat().st_size < MIB
    disk.check(path)


def test_nothing_is_overwritten(base: Path):
    with pytest.raises(ImageError, match=r"exists already$"):
        disk.create(base, MIB)
    with pytest.raises(ImageError, match=r"exists already$"):
        disk.overlay(base, base)
    assert read(base, 1) == b"\x11"


def test_overlay_hides_nothing_and_changes_nothing_below(base: Path):
    top = base.with_name("top.qcow2")
    disk.overlay(top, base)
    write(top, b"\x22" * 65536, at=MIB)
    assert (read(top, 1), read(top, 1, at=MIB), read(base, 1, at=MIB)) == (b"\x11", b"\x22", b"\0")
    assert disk.info(top)["backing-filename"] == str(base)
    disk.check(top)


def test_overlay_of_a_read_only_image(base: Path):
    base.chmod(0o444)
    disk.overlay(base.with_name("top.qcow2"), base)


def test_a_larger_overlay(base: Path):
    top = base.with_name("top.qcow2")
    disk.overlay(top, base, size=9 * MIB)
    assert disk.info(top)["virtual-size"] == 9 * MIB
    assert read(top, 1) == b"\x11"


def test_images_named_relatively_can_be_moved_together(base: Path, tmp_path: Path):
    top = base.with_name("top.qcow2")
    disk.overlay(top, base, relative=True)
    moved = base.parent.rename(tmp_path / "moved")
    assert disk.info(moved / "top.qcow2")["backing-filename"] == "base.qcow2"
    assert read(moved / "top.qcow2", 1) == b"\x11"


def test_an_image_moved_alone_is_told_where_its_backing_file_is(base: Path, tmp_path: Path):
    top = base.with_name("top.qcow2")
    disk.overlay(top, base, relative=True)
    kept = top.rename(tmp_path / "kept.qcow2")
    with pytest.raises(ImageError, match=r"base\.qcow2"):
        disk.check(kept)
    disk.reback(kept, base)
    assert read(kept, 1) == b"\x11"
    disk.check(kept)


def test_overlay_of_nothing_leaves_nothing(folder: Path):
    with pytest.raises(ImageError, match=r"^qemu-img create: .*No such file"):
        disk.overlay(folder / "top.qcow2", folder / "missing.qcow2")
    assert list(folder.iterdir()) == []


def test_create_where_nobody_may_write(folder: Path):
    (folder / "file").touch()
    with pytest.raises((ImageError, OSError), match="file"):
        disk.create(folder / "file/disk.qcow2", MIB)


def test_a_size_that_cannot_be(folder: Path):
    with pytest.raises(ImageError, match=r"^qemu-img create: "):
        disk.create(folder / "disk.qcow2", 1 << 62)
    assert list(folder.iterdir()) == []


def test_flatten(base: Path):
    top, flat = base.with_name("top.qcow2"), base.with_name("flat.qcow2")
    disk.overlay(top, base)
    write(top, b"\x22" * 65536, at=MIB)
    disk.flatten(top, flat)
    base.unlink()
    assert (read(flat, 1), read(flat, 1, at=MIB)) == (b"\x11", b"\x22")
    assert "backing-filename" not in disk.info(flat)
    assert flat.stat().st_mode & 0o777 == 0o444
    disk.check(flat)


def test_flatten_that_fails_leaves_nothing(base: Path):
    top, flat = base.with_name("top.qcow2"), base.with_name("flat.qcow2")
    disk.overlay(top, base)
    base.unlink()
    with pytest.raises(ImageError, match=r"^qemu-img convert: "):
        disk.flatten(top, flat)
    assert [path.name for path in base.parent.iterdir()] == ["top.qcow2"]


# ---- damage


def header(path: Path) -> dict[str, int]:
    raw = path.read_bytes()[:104]
    return {"l1": int.from_bytes(raw[40:48], "big"), "refcounts": int.from_bytes(raw[48:56], "big")}


def poke(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as image:
        image.seek(at)
        image.write(data)


def test_a_sound_image_passes(base: Path):
    disk.check(base)


def test_a_wrong_reference_count_is_damage(base: Path):
    poke(base, header(base)["refcounts"], bytes(8))
    with pytest.raises(ImageError, match=r"base.qcow2: the image is damaged: ") as caught:
        disk.check(base)
    assert "ERROR" in str(caught.value)


def test_a_table_that_points_nowhere_is_damage(base: Path):
    poke(base, header(base)["l1"], (0x8000000000000000 | 0x7FFF0000).to_bytes(8, "big"))
    with pytest.raises(ImageError, match="damaged"):
        disk.check(base)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"no image at all" * 1000])
def test_a_file_that_is_no_image(content: bytes, base: Path):
    base.write_bytes(content)
    with pytest.raises(
        ImageError, match=r"base.qcow2: the image cannot be checked: .*(not in qcow2 format|[Cc]ould not)"
    ):
        disk.check(base)


def test_a_truncated_image(base: Path):
    os.truncate(base, 2 * 65536)
    with pytest.raises(ImageError):
        disk.check(base)


def test_a_missing_image(folder: Path):
    for attempt in (disk.check, disk.info):
        with pytest.raises(ImageError, match="No such file"):
            attempt(folder / "none.qcow2")


def test_an_image_in_use_is_not_called_damaged(base: Path):
    argv = ["qemu-io", "-f", "qcow2", base]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        user.stdin.write(b"write 0 512\n")
        user.stdin.flush()
        assert b"wrote" in user.stdout.readline() + user.stdout.readline()
        with pytest.raises(ImageError, match=r"(?i)lock") as caught:
            disk.check(base)
        assert "damaged" not in caught.value.message
        assert disk.info(base)["virtual-size"] == 4 * MIB, "looking is allowed"
        user.stdin.write(b"quit\n")
        user.stdin.close()
        user.wait(10)


def test_info_is_what_qemu_img_says(base: Path):
    said = subprocess.run(["qemu-img", "info", "--output=json", base], capture_output=True, check=True).stdout
    assert disk.info(base) == json.loads(said)
