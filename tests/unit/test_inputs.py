"""What makes the steps that build stale: real doit, a copy of vmtasks that is edited, boot sectors for a guest."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_build import Guest

from vmtasks.machine import argv

pytestmark = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")

PACKAGE = Path(__file__).parents[2] / "vmtasks"
STEPS = ["fetch", "phase:1", "phase:2", "phase_iso:1", "phase_iso:2", "render:1", "render:2", "snapshot"]


class Built(Guest):
    """A project whose guest is installed, and a vmtasks of its own that does it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        guest = root / "phases/sector/guest.toml"
        guest.write_text(guest.read_text().replace("packages = [", 'files = "files"\npackages = [', 1))
        self.files = guest.with_name("files")
        self.files.mkdir()
        (self.files / "motd").write_text("hello\n")
        (self.files / "link").symlink_to("motd")
        self.again()
        self.package = root / "lib/vmtasks"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "dodo.py").write_text("from vmtasks.tasks import *\n")

    def doit(self, *words: str, status: int = 0) -> str:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHONPATH": str(self.package.parent)}
        env |= {"VMTASKS_STORE": str(self.root / "store"), "VM_ACCEL": "tcg"}
        done = subprocess.run(
            [sys.executable, "-B", "-m", "doit", *words],
            cwd=self.root,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def stale(self) -> list[str]:
        """The steps that doit would carry out, by itself or because of another."""
        listed = self.doit("list", "--all", "--status", "--template", "{status} {name}\n")
        states = dict(reversed(line.split()) for line in listed.splitlines() if line)
        return [name for name in STEPS if states[name] != "U"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    made = Built(tmp_path_factory.mktemp("inputs") / "project")
    made.prepare()
    made.doit("snapshot")
    assert made.boots() == ["1-install", "2-provision"]
    return made


@pytest.fixture
def project(built: Built) -> Iterator[Built]:
    """That project. What a test has edited is put back, and then nothing is stale."""
    files = {path: path.read_bytes() for folder in ("lib", "phases") for path in (built.root / folder).rglob("*.*")
             if path.is_file()}  # fmt: skip
    assert built.stale() == []
    yield built
    for path, data in files.items():
        if path.read_bytes() != data:
            path.write_bytes(data)
    built.doit("phase_iso")


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("media/phase/lib.sh", "# What a phase", "# All that a phase", ["render:1", "render:2"]),
        ("media/phase/run.sh", "# Runs the phase", "# Carries out the phase", ["render:1", "render:2"]),
        ("media/installer.py", "FORMAT = 1", "FORMAT = 1000", ["fetch"]),
        ("plan.py", "FORMAT = 1", "FORMAT = 1000", STEPS[1:-1]),
    ],
)
def test_what_comes_with_vmtasks_is_an_input(project: Built, file: str, old: str, new: str, stale: list[str]):
    path = project.package / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert project.stale() == stale
    if stale[0] == "render:1":
        project.doit("phase_iso")
        assert project.stale() == ["phase:1", "phase:2"]


@pytest.mark.parametrize("change", ["mode", "target", "folder"])
def test_what_the_installer_is_made_of_is_an_input(project: Built, change: str):
    """A link and a mode have no bytes of their own, and count all the same."""
    motd, link, folder = project.files / "motd", project.files / "link", project.files / "new"
    if change == "mode":
        motd.chmod(0o755)
    elif change == "target":
        link.unlink()
        link.symlink_to("/etc/motd")
    else:
        folder.mkdir()
    try:
        assert project.stale() == ["fetch"]
        assert "what the installer is made of has changed" in project.doit("info", "fetch", status=1)
    finally:
        motd.chmod(0o644)
        link.unlink()
        link.symlink_to("motd")
        if folder.is_dir():
            folder.rmdir()


def test_an_overlay_that_cannot_be_read_is_told_without_a_traceback(project: Built):
    strange = project.files / "pipe"
    os.mkfifo(strange)
    try:
        assert "fetch" in project.stale()
        assert f"{strange} is neither a file, a folder nor a link" in project.doit("info", "fetch", status=1)
    finally:
        strange.unlink()


def test_in_a_new_store_the_second_run_renders_nothing(project: Built):
    private = project.root / "store/keys/id_ed25519"
    private.rename(private.with_suffix(".old"))
    private.with_suffix(".pub").unlink()
    project.doit("render")
    assert private.is_file()
    assert "render:1" not in project.stale()
