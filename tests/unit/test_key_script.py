"""key.sh, run by this host's sh on systems that are folders."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "vmtasks/media/phase/key.sh"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample somebody's key"


@pytest.fixture
def cd(tmp_path: Path) -> Path:
    """The CD, mounted."""
    folder = tmp_path / "the cd"
    folder.mkdir()
    (folder / "key.sh").write_text(SCRIPT.read_text())
    (folder / "authorized_keys").write_text(KEY + "\n")
    (folder / "user").write_text("dev\n")
    return folder


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A system with one user, whose home is ours."""
    root = tmp_path / "the system"
    (root / "etc").mkdir(parents=True)
    (root / "home/dev").mkdir(parents=True)
    own = f"{os.getuid()}:{os.getgid()}"
    (root / "etc/passwd").write_text(
        f"root:x:0:0::/root:/bin/sh\ndev:*:{own}:A * person:/home/dev:/bin/csh\nd:x:1:1::/:\n"
    )
    return root


def key_sh(cd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", cd / "key.sh", *words], capture_output=True, text=True, check=False)


def keys(system: Path) -> Path:
    return system / "home/dev/.ssh/authorized_keys"


def test_the_key_is_installed_once(cd: Path, system: Path) -> None:
    for _ in range(2):
        done = key_sh(cd, "-r", str(system))
        assert done.returncode == 0, done.stderr
        assert "may log in as dev" in done.stdout
    assert keys(system).read_text() == KEY + "\n"
    assert stat.S_IMODE(keys(system).stat().st_mode) == 0o600
    assert stat.S_IMODE(keys(system).parent.stat().st_mode) == 0o700


def test_other_keys_stay_and_a_last_line_without_end_is_ended(cd: Path, system: Path) -> None:
    keys(system).parent.mkdir()
    keys(system).write_text("ssh-rsa another")
    assert key_sh(cd, "-r", str(system), "dev").returncode == 0
    assert keys(system).read_text() == f"ssh-rsa another\n{KEY}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nobody-here"], "there is no user nobody-here"),
        (["root"], "root has no home"),
        (["d.v"], "there is no user d.v"),
    ],
)
def test_users_that_cannot_log_in(cd: Path, system: Path, words: list[str], says: str) -> None:
    done = key_sh(cd, "-r", str(system), *words)
    assert done.returncode == 1
    assert says in done.stderr
    assert not keys(system).exists()


def test_a_folder_that_is_no_system(cd: Path, tmp_path: Path) -> None:
    done = key_sh(cd, "-r", str(tmp_path))
    assert done.returncode == 1
    assert "there is no system in" in done.stderr
    assert key_sh(cd, "-x").returncode == 2
