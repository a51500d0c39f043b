"""The example configurations, read by the loader that every run uses."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmtasks.config import rules
from vmtasks.config.load import Config, load

TOP = Path(__file__).parents[2]
SUITES = {
    "build_cancellation",
    "build_integration",
    "capture_fixtures",
    "e2e",
    "fixtures",
    "integration",
    "integration_e2e",
    "orphans",
    "phase4",
    "procctl",
    "procctl_reaping",
    "procfind",
    "unit",
}
"""The test targets of go-synth's Makefile, but for vm-test-all and vm-quick, which are tasks of ours."""
BIG_MEMORY = {"memory": "512M"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project as somebody would make it of a checkout: our phases, the example's configuration."""
    shutil.copytree(TOP / "phases/dragonfly", tmp_path / "phases/dragonfly")
    shutil.copy2(TOP / "examples/go-synth/vm.toml", tmp_path / "vm.toml")
    shutil.copy2(TOP / "dodo.py", tmp_path / "dodo.py")
    return tmp_path


@pytest.fixture
def go_synth(project: Path) -> Config:
    config = load(project, {"config": "vm.toml", **BIG_MEMORY}, {})
    rules.check(config)
    return config


def test_go_synth_has_all_suites_of_its_makefile(go_synth: Config) -> None:
    assert set(go_synth.suites) == SUITES
    assert go_synth.quick == ("phase4",)
    assert go_synth.guest.name == "dragonfly"
    assert go_synth.build.command == "make clean && make build"
    assert go_synth.ssh_port == 2222


@pytest.mark.parametrize("name", ["phase4", "procctl", "procctl_reaping", "procfind", "orphans"])
def test_what_mounts_or_kills_runs_as_root(go_synth: Config, name: str) -> None:
    assert go_synth.suites[name].user == "root"


def test_only_what_stands_at_the_top_is_left_out(go_synth: Config) -> None:
    """Neither scripts/vm/ nor .git/ may be missing in the guest; databases are left out wherever they are."""
    assert [pattern for pattern in go_synth.sync.exclude if not pattern.startswith("/")] == ["*.db"]
    assert "/vm/" in go_synth.sync.exclude
    assert not any(".git" in pattern for pattern in go_synth.sync.exclude)


def test_doit_makes_its_tasks(project: Path) -> None:
    words = [sys.executable, "-m", "doit", "config=vm.toml", "memory=512M", "list", "--all", "--quiet"]
    done = subprocess.run(
        words, cwd=project, env={"PATH": "", "PYTHONPATH": str(TOP)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {f"test:{name}" for name in SUITES} <= set(done.stdout.split())


def test_a_configuration_that_is_not_there_is_named(project: Path) -> None:
    words = [sys.executable, "-m", "doit", "list"]
    env = {"PATH": "", "PYTHONPATH": str(TOP), "VM_CONFIG": "none-such.toml"}
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "none-such.toml" in done.stderr
