"""A store on a file system that fills up: a clear error, nothing half-written believed; with more space it goes on."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Cli

from conftest import Project, copy_store
from vmtasks.store.store import Store

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system"),
]

ROOM = 20 << 20
"""Bytes that are left for images of 40 MB."""


@pytest.fixture
def small(tmp_path: Path, store: Path) -> Iterator[Path]:
    """A store with the installer in it and little room besides."""
    root = tmp_path / "small"
    root.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2G", "tmpfs", root], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {mount.stderr.strip()}")
    try:
        copy_store(store, root, images=False)
        used = os.statvfs(root)
        resize(root, (used.f_blocks - used.f_bfree) * used.f_frsize + ROOM)
        yield root
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def resize(root: Path, size: int) -> None:
    """Change the size of a mounted tmpfs."""
    subprocess.run(["mount", "-o", f"remount,size={size >> 10}k", root], check=True)


@pytest.mark.exhaustive
def test_a_store_that_fills_up(tmp_path: Path, small: Path) -> None:
    project = Project(tmp_path / "project", small)
    output = project.doit("auto_install").bad()
    assert "o space left on" in output
    assert "VMTASKS_STORE" in output
    assert project.published() == set()
    assert [path for path in (small / "images").iterdir() if path.suffix == ".qcow2"] == []
    assert not list(small.glob("failed/*")), "no disk is kept that tells nothing"
    assert project.qemus() == []
    output = project.doit("auto_install").bad()
    assert "o space left on" in output, "and again, with what the first has left behind"
    resize(small, 2 << 30)
    project.doit("phase:1").good()
    (digest,) = project.published()
    assert Store(small).find(digest, look="bytes")[1] == ""
    project.clean_up()


@pytest.fixture
def cli(tmp_path: Path, store: Path) -> Iterator[Cli]:
    """A project whose machines are on a file system of 6 MB."""
    project = Project(tmp_path / "project", store)
    made = Cli(project)
    made.run_folder.mkdir(parents=True, exist_ok=True)
    argv = ["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", made.run_folder]
    mount = subprocess.run(argv, capture_output=True, text=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {mount.stderr.strip()}")
    try:
        yield made
        project.clean_up()
    finally:
        subprocess.run(["umount", "-l", made.run_folder], check=True)


@pytest.mark.exhaustive
def test_a_machine_whose_disk_finds_no_space_goes_on_when_there_is_some(cli: Cli) -> None:
    cli.make("box")
    fill = ["dd", "if=/dev/urandom", "of=big", "bs=64k", "count=200", "conv=fsync"]
    writing = cli.start("exec", "box", *fill)
    said = writing.stderr.readline().decode()  # type: ignore[union-attr]
    assert "its disk could not be written" in said
    assert f"free some space in {cli.run_folder / 'box'}: the next command lets it go on" in said
    for words in (("exec", "box", "true"), ("resume", "box"), ("exec", "-d", "box", "true")):
        refused = cli(*words)
        assert refused.returncode != 0
        assert "its disk cannot be written" in refused.stderr.decode()
        assert "Traceback" not in refused.stderr.decode()
    assert "free some space in" in cli("doctor", "box").stdout.decode()
    assert cli.machine("box")["status"] == "paused"
    resize(cli.run_folder, 64 << 20)
    assert cli.good("exec", "box", "echo", "here") == "here\n"
    assert writing.wait(120) == 0, "and the guest has not noticed anything"
    assert cli.good("exec", "box", "stat", "-c", "%s", "big") == f"{200 << 16}\n"
    assert cli("doctor", "box").returncode == 0
    cli.good("stop", "box")
    cli.good("rm", "--force", "box")
