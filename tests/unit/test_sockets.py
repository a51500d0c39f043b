"""The short folders of machines' sockets: made when asked for, and removed when nobody has used them for long."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmtasks.machines import Project
from vmtasks.qemu import vm

DAY_S = 86400.0


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the folders are, for this test alone; its path must be short."""
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    yield vm.socket_base()
    shutil.rmtree(short)


def aged(folder: Path, age_s: float) -> Path:
    """Not used since `age_s` seconds."""
    then = time.time() - age_s
    os.utime(folder, (then, then))
    return folder


def bound(folder: Path, name: str) -> socket.socket:
    """A socket with a name in the folder, on which nobody listens yet."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(folder / name))
    return made


def test_old_folders_without_a_server_go(base: Path, tmp_path: Path) -> None:
    empty, dead, live, new, busy = (vm.socket_folder(tmp_path / name) for name in ("e", "d", "l", "n", "b"))
    bound(dead, "qmp").close()
    (dead / "ssh_config").write_text("")
    with bound(live, "ssh-1") as serving, bound(busy, "serial") as silent:
        serving.listen()
        silent.listen(0)
        with socket.socket(socket.AF_UNIX) as only:  # whose server has not taken it, so that a second one must wait
            only.connect(str(busy / "serial"))
            for folder in (empty, dead, live, busy):
                aged(folder, DAY_S + 60)
            aged(new, DAY_S - 60)
            other = base / "notes"
            other.mkdir()
            aged(other, 9 * DAY_S)
            assert sorted(vm.reap_sockets()) == sorted([empty, dead])
    assert sorted(base.iterdir()) == sorted([live, new, busy, other])


def test_a_folder_that_is_asked_for_is_in_use(base: Path, tmp_path: Path) -> None:
    folder = aged(vm.socket_folder(tmp_path / "a"), 9 * DAY_S)
    assert vm.socket_folder(tmp_path / "a") == folder
    assert vm.reap_sockets() == []
    assert list(base.iterdir()) == [folder]


def test_every_command_of_a_project_reaps(base: Path, tmp_path: Path) -> None:
    folder = aged(vm.socket_folder(tmp_path / "gone"), 9 * DAY_S)
    project = Project(None, {"VM_DIR": str(tmp_path / "state"), "VMTASKS_STORE": str(tmp_path / "store")})
    assert project.reap() == []
    assert not folder.exists()
    base.chmod(0o755)  # somebody else might have made it: that is for who needs it to say
    assert project.reap() == []
