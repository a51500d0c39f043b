"""The CD that lets the key in, and where a machine's screen can be shown."""

import subprocess
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from vmtasks.byhand import console
from vmtasks.errors import MissingToolError, StateError
from vmtasks.images.workspace import Workspace

WITH_WINDOWS = "Available display backend types:\nnone\ngtk\nsdl\ncurses\n"
WITHOUT = "Available display backend types:\nnone\ncurses\ndbus\n"


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QEMU that lists displays as this one may not."""
    program = tmp_path / "bin/qemu-system-x86_64"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ntest "$*" = \'-display help\' && exec /bin/cat "$0.list"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return program.with_name("qemu-system-x86_64.list")


def test_the_best_window_is_taken(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.write_text(WITH_WINDOWS)
    monkeypatch.setenv("DISPLAY", ":0")
    assert console.window(wanted=True) == "gtk"
    qemu.write_text(WITH_WINDOWS.replace("gtk\n", ""))
    assert console.window(wanted=True) == "sdl"


def test_a_window_needs_a_screen(qemu: Path) -> None:
    qemu.write_text(WITH_WINDOWS)
    with pytest.raises(StateError, match="neither DISPLAY nor WAYLAND_DISPLAY is set"):
        console.window(wanted=True)


def test_a_qemu_without_windows(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.write_text(WITHOUT)
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(MissingToolError, match="this QEMU can open no window") as caught:
        console.window(wanted=True)
    assert "qemu-system-gui" in caught.value.hint


def test_the_cd_of_the_key(tmp_path: Path) -> None:
    """All that a person needs, nothing that PFI would run, and no private half."""
    private, public = tmp_path / "id_ed25519", tmp_path / "id_ed25519.pub"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", private], check=True)

    class Keys(Workspace):
        key = private  # type: ignore[assignment]

        def __init__(self) -> None:
            """Only the key is asked for."""

    console.key_cd(Keys(), "dev", tmp_path / "key.iso")
    iso = PyCdlib()
    iso.open(str(tmp_path / "key.iso"))
    names = {child.rock_ridge.name().decode() for child in iso.list_children(rr_path="/") if child.rock_ridge}
    iso.close()
    assert names - {"", ".", ".."} == {"README", "authorized_keys", "key.sh", "user"}
    content = (tmp_path / "key.iso").read_bytes()
    assert public.read_bytes().strip() in content
    assert b"PRIVATE KEY" not in content
    assert b"pfi_script" not in content
    assert b"log in as dev" in content
