import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmtasks.errors import ImageError
from vmtasks.host import process
from vmtasks.media.iso import Boot, write_iso
from vmtasks.media.tree import Entry

needs_bsdtar = pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar is not installed")
needs_xorriso = pytest.mark.skipif(shutil.which("xorriso") is None, reason="xorriso is not installed")

ENTRIES = [
    Entry("pfi.conf", "file", 0o644, b"pfi_script=run.sh\n"),
    Entry("PFI.CONF", "file", 0o600, b"another"),
    Entry("run.sh", "file", 0o755, b"#!/bin/sh\n"),
    Entry('it\'s a "name" - ünïcode', "dir", 0o750),
    Entry('it\'s a "name" - ünïcode/$(x); 文字.txt', "file", 0o644, b"odd"),
    Entry("n" * 240, "file", 0o644, b"long"),
    Entry("n" * 239 + "m", "file", 0o644, b"longer"),
    Entry("d/" * 14 + "deep", "file", 0o644, b"deep"),
    Entry("link", "link", 0o777, target="/bin/../bin/busybox"),
    Entry("far", "link", 0o777, target="/".join(["part" * 20] * 12)),
    Entry("empty", "file", 0o644),
    Entry("tmp", "dir", 0o1777),
    Entry("su", "file", 0o4755, b"x"),
    Entry("boot/image.bin", "file", 0o644, bytes(4096)),
]


@needs_bsdtar
def test_everything_survives(tmp_path):
    write_iso(tmp_path / "a.iso", ENTRIES, label="TEST", boot=Boot("boot/image.bin", "boot/boot.cat"))
    out = tmp_path / "out"
    out.mkdir()
    process.run(["bsdtar", "-xpf", tmp_path / "a.iso", "-C", out], timeout_s=20, env={"LC_ALL": "C.UTF-8"})
    for entry in ENTRIES:
        path = out / entry.path
        if entry.kind == "link":
            assert str(path.readlink()) == entry.target
            continue
        assert path.stat().st_mode & 0o1777 == entry.mode & 0o1777
        if entry.kind == "dir":
            assert path.is_dir()
        elif entry.path != "boot/image.bin":  # which has its boot information table now
            assert path.read_bytes() == entry.read()


@needs_xorriso
def test_second_reader_sees_boot_image_owner_and_modes(tmp_path):
    write_iso(tmp_path / "a.iso", ENTRIES, label="TEST", boot=Boot("boot/image.bin", "boot/boot.cat"))
    said = process.run(["xorriso", "-indev", tmp_path / "a.iso", "-report_el_torito", "plain"], timeout_s=20).stdout
    assert "/boot/image.bin" in said
    assert "boot-info-table" in said
    said = process.run(["xorriso", "-indev", tmp_path / "a.iso", "-find", "/su", "-exec", "lsdl"], timeout_s=20).stdout
    assert said.split()[:4] == ["-rwsr-xr-x", "1", "0", "0"]
    assert "Jan  1  2000" in said


def test_same_bytes_whatever_umask_zone_time_and_order(tmp_path, monkeypatch):
    write_iso(tmp_path / "a.iso", ENTRIES, label="TEST")
    before = os.umask(0o077)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        time.sleep(1.1)
        write_iso(tmp_path / "b.iso", reversed(ENTRIES), label="TEST")
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()
    assert (tmp_path / "a.iso").read_bytes() == (tmp_path / "b.iso").read_bytes()


def test_file_of_the_host_is_the_same_as_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(256)) * 9000)
    write_iso(tmp_path / "a.iso", [Entry("f", "file", 0o644, tmp_path / "f")], label="TEST")
    write_iso(tmp_path / "b.iso", [Entry("f", "file", 0o644, bytes(range(256)) * 9000)], label="TEST")
    assert (tmp_path / "a.iso").read_bytes() == (tmp_path / "b.iso").read_bytes()


def test_the_clock_runs_again(tmp_path):
    from pycdlib import pycdlib  # noqa: PLC0415

    write_iso(tmp_path / "a.iso", ENTRIES, label="TEST")
    assert abs(pycdlib.time.time() - time.time()) < 5


@pytest.mark.parametrize(
    "entry",
    [
        Entry("n" * 256, "file"),
        Entry("ü" * 130, "file"),
        Entry("zero\0", "file"),
        Entry("lone\udcff", "file"),
        Entry("gone", "file", 0o644, data=None),
    ],
    ids=["long", "many bytes", "zero", "surrogate", "gone"],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, entry):
    if entry.data is None:
        entry = Entry("gone", "file", 0o644, tmp_path / "absent")
    with pytest.raises(ImageError):
        write_iso(tmp_path / "a.iso", [entry], label="TEST")
    assert not list(tmp_path.iterdir())


def test_boot_image_must_be_there(tmp_path):
    with pytest.raises(ImageError, match="boot image nothing"):
        write_iso(tmp_path / "a.iso", ENTRIES, label="TEST", boot=Boot("nothing"))
    with pytest.raises(ImageError, match="boot catalog"):
        write_iso(tmp_path / "a.iso", ENTRIES, label="TEST", boot=Boot("boot/image.bin", "none/boot.cat"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_file_system_is_an_image_error(tmp_path, monkeypatch):
    from vmtasks.media import iso  # noqa: PLC0415

    @contextmanager
    def full(_path):
        yield Path("/dev/full")

    monkeypatch.setattr(iso, "replacing", full)
    with pytest.raises(ImageError, match="No space left"):
        write_iso(tmp_path / "a.iso", ENTRIES, label="TEST")
