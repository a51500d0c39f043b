"""What makes the steps that build stale: real doit, a copy of vmtasks that is edited, boot sectors for a guest."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_build import Guest

from amount import cases
from vmtasks.qemu import argv

pytestmark = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")

PACKAGE = Path(__file__).parents[2] / "vmtasks"
STEPS = ["fetch", "phase:1", "phase:2", "phase_iso:1", "phase_iso:2", "render:1", "render:2", "snapshot"]
AFTER_FETCH = ["fetch", "phase:1", "phase:2", "snapshot"]
"""What nobody knows to be up to date until the installer is there."""


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
        shutil.copytree(PACKAGE, self.package)
        (root / "dodo.py").write_text("from vmtasks.tasks import *\n")

    def start(self, *words: str) -> subprocess.Popen[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHONPATH": str(self.package.parent)}
        env |= {"VMTASKS_STORE": str(self.root / "store"), "VM_ACCEL": "tcg", "PYTHONUNBUFFERED": "1"}
        argv = [sys.executable, "-m", "doit", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            argv, cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def doit(self, *words: str, status: int = 0) -> str:
        with self.start(*words) as run:
            said, _ = run.communicate(timeout=60)
        assert run.returncode == status, said
        return said

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

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
             if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert built.stale() == []
    yield built
    for path, data in files.items():
        if path.read_bytes() != data:
            path.write_bytes(data)
    built.doit("phase_iso")


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("media/phase/lib.sh", "# What a phase", "# All that a phase", STEPS[1:]),
        ("media/phase/run.sh", "# Runs the phase", "# Carries out the phase", STEPS[1:]),
        ("installer/installer.py", "FORMAT = 1", "FORMAT = 1000", AFTER_FETCH),
        ("images/plan.py", "FORMAT = 2", "FORMAT = 1000", STEPS[1:]),
    ],
)
def test_what_comes_with_vmtasks_is_an_input(project: Built, file: str, old: str, new: str, stale: list[str]):
    path = project.package / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert project.stale() == stale
    if "render:1" in stale:
        project.doit("phase_iso")
        assert project.stale() == ["phase:1", "phase:2", "snapshot"]


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
        assert project.stale() == AFTER_FETCH
        named = {"mode": "files/motd changed", "target": "files/link changed", "folder": "files/new is new"}
        assert f"\n  {named[change]}\n" in project.doit("info", "fetch", status=1)
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


@pytest.mark.parametrize("damage", cases(b"exit 0\n", more=[b"", b"#"]))
def test_a_rendered_file_that_was_damaged_is_rendered_again(project: Built, damage: bytes):
    path = next((project.root / ".vm").glob("*/phase-2/run.sh"))
    whole = path.read_bytes()
    path.chmod(0o755)
    path.write_bytes(damage)
    assert project.stale() == ["render:2"]
    assert "phase-2/run.sh is not as it was rendered" in project.doit("info", "render:2", status=1)
    project.doit("phase_iso")
    assert path.read_bytes() == whole
    assert project.stale() == []


def test_a_folder_in_the_place_of_an_iso_is_told(project: Built):
    iso = next((project.root / ".vm").glob("*/phase-2.iso"))
    iso.unlink()
    iso.mkdir()
    try:
        assert "phase_iso:2" in project.stale()
        said = project.doit("phase_iso:2", status=1)
        assert f"{iso}: Is a directory\n  hint: a file belongs there: move that folder away" in said
    finally:
        iso.rmdir()


def test_in_a_new_store_the_second_run_renders_nothing(project: Built):
    private = project.root / "store/keys/id_ed25519"
    private.rename(private.with_suffix(".old"))
    private.with_suffix(".pub").unlink()
    project.doit("render")
    assert private.is_file()
    assert "render:1" not in project.stale()


def test_two_runs_in_one_folder_take_turns(tmp_path: Path):
    """What they make are two images, but the phase's files, its CD, its console and its log are the same files."""
    made = Built(tmp_path / "project")
    made.prepare(ticks=60)
    one = made.start("phase:1")
    made.wait_for(lambda: made.boots() == ["1-install"])
    two = made.start("disk=8M", "phase:1")
    said = two.stdout.readline()
    assert f"phase 1-install of sector: process {one.pid} is making it; waiting" in said
    assert one.poll() is None
    assert made.boots() == ["1-install"]
    assert [run.wait(60) for run in (one, two)] == [0, 0]
    assert made.boots() == ["1-install", "1-install"]
    logs = made.builder.home / "logs"
    assert all("exit 0 done" in (logs / f"1-install.console.log{which}").read_text() for which in ("", ".1"))
