"""Tasks that people call between runs: prerequisites, phases' files, machines of several versions and names."""

import shutil
from pathlib import Path

import pytest

from conftest import Project

pytestmark = pytest.mark.timeout(600)

PROGRAMS = ("qemu-system-x86_64", "qemu-img", "rsync", "scp", "ssh", "ssh-keygen", "ssh-keyscan", "apt-get")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with all programs that are needed, and no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (*PROGRAMS, "python3"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


@pytest.mark.parametrize("hidden", PROGRAMS)
def test_a_program_that_is_missing_is_named_with_its_package(project: Project, programs: Path, hidden: str) -> None:
    (programs / hidden).unlink()
    output = project.doit("check_prereqs", env={"PATH": str(programs)}).bad()
    assert f"✗ {hidden}: {hidden} is not installed" in output
    assert "apt-get install" in output
    assert f"missing: {hidden}" in output
    for name in set(PROGRAMS) - {hidden}:
        assert f"✓ {name}: {programs / name}" in output


def test_all_programs_are_there(project: Project, programs: Path) -> None:
    output = project.doit("check_prereqs", env={"PATH": str(programs)}).good()
    assert "✗" not in output
    assert "✓ accelerator: " in output
    assert f"✓ store: {project.store}" in output


def test_phases_are_cleaned_and_nothing_boots_for_it(project: Project) -> None:
    project.doit("auto_install").good()
    left = project.tiny / "look-2.qcow2"
    left.touch()
    assert "7 removed" in project.doit("clean_phases").good()
    assert not left.exists()
    assert not [*project.tiny.glob("phase-*.iso"), *(path for path in project.tiny.glob("phase-*") if path.is_dir())]
    assert "0 removed" in project.doit("clean_phases").good()
    project.doit("auto_install").good()
    assert project.boots() == []
    assert len(list(project.tiny.glob("phase-*.iso"))) == 3


@pytest.mark.exhaustive
def test_cds_may_be_on_ide_which_is_where_other_guests_have_them(tmp_path: Path, bare_store: Path) -> None:
    """The installer starts from there, and finds the phase's CD."""
    project = Project(tmp_path / "project", bare_store)
    project.edit("phases/tiny/guest.toml", 'cd_bus = "virtio-scsi"', 'cd_bus = "ide"')
    project.doit("phase:1").good()
    assert [boot.phase for boot in project.boots()] == ["1-install"]


@pytest.mark.exhaustive
def test_versions_and_names_side_by_side(project: Project) -> None:
    """Started at the same time, in one folder: disk, port, process and results of each are its own."""
    one, two = project.start("port=auto", "start"), project.start("port=auto", "version=2", "start")
    one.wait().good()
    two.wait().good()
    try:
        first, second = project.machine("tiny"), project.machine("tiny-2")
        assert (first["guest"], second["guest"]) == ("tiny", "tiny-2")
        for key in ("pid", "ssh_port"):
            assert first[key] != second[key]
        assert len(project.qemus()) == 2
        assert project.ssh("echo one >mark").returncode == 0
        project.name = "tiny-2"
        assert project.ssh("cat mark").returncode == 1
        for words in (["start"], ["restore"], ["provision"], ["snapshot", "--name", "mixed"]):
            output = project.doit("version=2", "name=tiny", *words).bad()
            assert "machine tiny has guest tiny, not tiny-2; nothing was changed" in output
            assert "name=OTHER" in output
        project.doit("version=2", "destroy", "--yes").good()
        project.name = "tiny"
        assert project.ssh("cat mark").stdout == "one\n"
        assert project.qemus() == [first["pid"]]
    finally:
        project.name = "tiny"
        project.doit("version=2", "destroy", "--yes")
