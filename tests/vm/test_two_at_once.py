"""Several runs at the same time: each image is built once, and whoever waits says so."""

from pathlib import Path

import pytest

from conftest import Project, until

pytestmark = pytest.mark.timeout(600)

THREE = ["1-install", "2-packages", "3-provision"]


@pytest.mark.exhaustive
def test_in_one_folder_and_in_another_with_the_same_store(tmp_path: Path, bare_store: Path) -> None:
    here, there = Project(tmp_path / "here", bare_store), Project(tmp_path / "there", bare_store)
    runs = [here.start("auto_install"), here.start("auto_install"), there.start("auto_install")]
    outputs = [run.wait().good() for run in runs]
    boots = [*here.boots(), *there.boots()]
    assert sorted(boot.phase for boot in boots) == THREE
    assert len({boot.digest for boot in boots}) == len(THREE)
    assert bare_store.joinpath("keys/id_ed25519").is_file()
    assert sum("is making it; waiting" in output for output in outputs) >= 2
    assert here.digest(3) == there.digest(3)
    assert not here.qemus() + there.qemus()


@pytest.mark.exhaustive
def test_two_machines_of_two_folders_and_two_starts_of_one(tmp_path: Path, store: Path) -> None:
    here, there = Project(tmp_path / "here", store), Project(tmp_path / "there", store)
    try:
        runs = [here.start("quick"), here.start("start"), there.start("start")]
        for run in runs:
            run.wait().good()
        assert len(here.qemus()) == len(there.qemus()) == 1
        assert here.ssh("echo $HOME").stdout == there.ssh("echo $HOME").stdout == "/home/dev\n"
    finally:
        here.clean_up()
        there.clean_up()


@pytest.mark.exhaustive
def test_whoever_waits_for_one_that_is_killed_goes_on(tmp_path: Path, bare_store: Path) -> None:
    first, second = Project(tmp_path / "first", bare_store), Project(tmp_path / "second", bare_store)
    one = first.start("phase:1")
    until(first.boots, 30, "the first to boot")
    two = second.start("phase:1")
    two.wait_for("is making it; waiting")
    one.kill()
    two.wait().good()
    assert [boot.phase for boot in (*first.boots(), *second.boots())] == ["1-install"] * 2
    assert not first.qemus() + second.qemus()
