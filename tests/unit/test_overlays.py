"""Disks of machines on images that are built anew, damaged, moved or pruned: real images, real overlays, no boot."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import Guest, both
from test_store import damage

from amount import cases
from bootsector import ask, cd, phase, say, sector, write_disk
from vmtasks.errors import ImageError, StateError
from vmtasks.images.workspace import PhaseRecord
from vmtasks.installer.installer import recipe as recipe_of
from vmtasks.machines import Machine, MachineSpec, Project
from vmtasks.media import disk
from vmtasks.qemu import argv
from vmtasks.store.records import read_record, write_record

pytestmark = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")
WAYS = ["doit", "run"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """A project whose `clean` is there."""
    guest = Guest(tmp_path_factory.mktemp("first") / "project")
    guest.prepare()
    both(guest)
    guest.builder.snapshot()
    return guest


@pytest.fixture
def guest(first: Guest, tmp_path: Path) -> Guest:
    """A copy of that project with its store, to be spoiled."""
    copy = Guest.__new__(Guest)
    copy.root = Path(shutil.copytree(first.root, tmp_path / "project"))
    copy.again()
    return copy


def beside(guest: Guest, root: Path) -> Guest:
    """Another project on the same store, with the same guest."""
    other = Guest(root)
    (other.root / "store").symlink_to(guest.root / "store")
    write_record(other.builder.installer_record, guest.builder.media())
    for number in (1, 2):
        other.builder.render(number)
        other.builder.phase_iso(number)
    return other


def environ(guest: Guest) -> dict[str, str]:
    return {"HOME": str(guest.root), "VMTASKS_STORE": str(guest.root / "store")}


def machine(guest: Guest, way: str) -> Machine:
    """A machine with a disk, as `doit start` or `vmtasks run` makes it, that was never started."""
    project = Project(guest.root, environ(guest))
    made = project.create(MachineSpec(name="a")) if way == "run" else Machine(project.config(), "a")
    made.restore()
    return made


def shown(path: Path) -> str:
    """Digest of what a guest sees of a disk."""
    raw = path.with_name("raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True, timeout=60)
    digest = hashlib.sha256(raw.read_bytes()).hexdigest()
    raw.unlink()
    return digest


def other_packages(guest: Guest, word: str) -> None:
    """The installer writes another disk from now on, though nothing that the digest is made of has changed."""
    last = phase(guest.token(2), steps=("provision",))
    image = cd(
        ask("OK ", "boot"),
        say(f"::vmtasks:{guest.token(1)}:begin\r\n"),
        write_disk(sector(say(f"{word}\r\n"), last)),
        phase(guest.token(1), steps=("install",)),
    )
    guest.builder.installer().write_bytes(image)


# ---- built anew


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", cases(1, more=[2]))
def test_what_a_disk_stands_on_stays_when_its_image_is_built_anew(guest: Guest, way: str, number: int):
    made = machine(guest, way)
    before = shown(made.place.disk)
    other_packages(guest, "other packages")
    for again in range(number, 3):
        guest.builder.build(again, anew=again == number)
    guest.builder.snapshot()
    assert shown(made.place.disk) == before
    assert len(guest.boots()) == (4 if number == 1 else 3)
    made.restore()
    assert (shown(made.place.disk) == before) == (number == 2), "and a new disk is made on the new image"


@pytest.mark.parametrize("way", WAYS)
def test_what_a_disk_stands_on_stays_when_a_damaged_image_is_built_again(guest: Guest, way: str):
    made = machine(guest, way)
    image = guest.image(2)
    damage(image, 0)
    assert guest.builder.store.find(guest.builder.nodes()["phase:2"].digest, look="bytes")[0] is None
    damaged = image.read_bytes()
    both(guest)
    assert guest.boots() == ["1-install", "2-provision", "2-provision"]
    assert guest.builder.store.image(
        guest.builder.store.find(guest.builder.nodes()["phase:2"].digest)[0]
    ) == guest.image(2)
    assert image.read_bytes() == damaged or guest.image(2) == image, "only the very same bytes take its name"
    guest.builder.snapshot()
    assert made.place.disk.exists()


def test_a_project_does_not_notice_what_another_builds(guest: Guest, tmp_path: Path):
    other = beside(guest, tmp_path / "other")
    both(other)
    other.builder.snapshot()
    assert other.boots() == [], "it need not build what the store has"
    before = read_record(guest.builder.clean_record, PhaseRecord)
    other_packages(guest, "other packages")
    other.builder.build(1, anew=True)
    assert other.builder.why_stale("phase:1") == ""
    both(other)
    other.builder.snapshot()
    assert other.boots() == ["1-install", "2-provision"], "the second phase grows from its own first one"
    assert [guest.builder.why_stale(f"phase:{number}") for number in (1, 2)] == ["", ""]
    assert guest.builder.image_fault(guest.builder.clean_record) == ""
    assert machine(guest, "run").image().sha256 == before.sha256
    assert machine(other, "run").image().sha256 != before.sha256
    both(guest)
    assert len(guest.boots()) == 2, "and nothing is built again"


# ---- the image as it comes with vmtasks, where there is no project


def test_who_has_no_project_gets_what_its_own_scripts_make(guest: Guest, tmp_path: Path):
    other = beside(guest, tmp_path / "other")
    recipe = recipe_of(other.builder.config)[0]
    write_record(other.builder.store.root / "media" / f"{recipe}.toml", guest.builder.media())
    template = other.root / "phases/sector/2-provision.sh.j2"
    template.write_text(template.read_text() + "# customised\n")
    assert other.builder.adopt() == "the image of phase 2-provision", "nobody else's will do"
    assert not other.builder.clean_record.exists()
    template.write_text(template.read_text().replace("# customised\n", ""))
    assert other.builder.adopt() == ""
    assert read_record(other.builder.clean_record, PhaseRecord) == read_record(guest.builder.clean_record, PhaseRecord)
    assert other.boots() == []


def test_a_store_without_the_installer_says_so(tmp_path: Path):
    guest = Guest(tmp_path)
    assert guest.builder.adopt() == "the installer"


# ---- refused


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [1, 2])
def test_a_disk_does_not_start_on_a_damaged_image(guest: Guest, way: str, number: int):
    made = machine(guest, way)
    damage(guest.image(number), 0)
    with pytest.raises(StateError, match="does not have the bytes that its record says") as caught:
        made.start()
    assert caught.value.hint
    assert not made.place.qemu_log.exists(), "nothing was booted"
    assert "the image was damaged" in guest.builder.why_stale(f"phase:{number}"), "so that doit builds it again"
    with pytest.raises(StateError, match="a"):
        made.snapshot("kept")


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_does_not_start_without_its_image(guest: Guest, way: str):
    made = machine(guest, way)
    guest.image(2).unlink()
    with pytest.raises(StateError, match="is gone") as caught:
        made.start()
    assert caught.value.hint
    assert not made.place.qemu_log.exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_does_not_start_on_another_image(guest: Guest, way: str):
    """As an older version could leave it that was killed while it restored a machine."""
    made = machine(guest, way)
    made.place.disk.unlink()
    disk.overlay(made.place.disk, guest.image(1))
    with pytest.raises(StateError, match=rf"is backed by {guest.image(1).name}\n") as caught:
        made.start()
    assert f"restore{' a' if way == 'run' else ''}, which discards the machine's writes" in caught.value.hint
    made.restore()
    assert disk.info(made.place.disk)["full-backing-filename"] == str(guest.image(2))


def test_a_raw_error_of_qemu_img_becomes_the_image_that_is_damaged(guest: Guest):
    """The disk's own tables are broken; the image has other bytes where no sample looks. Then all are read."""
    made = machine(guest, "run")
    damage(made.place.disk, 0x30000, b"\xff" * 4096)
    with pytest.raises(ImageError, match=r"^qemu-img convert: "):
        made.snapshot("kept")
    image = guest.image(2)
    damage(image, next(at for at in range(1 << 16, image.stat().st_size, 512) if not_sampled(guest, at)))
    with pytest.raises(ImageError, match=f"{image.name} does not have the bytes") as caught:
        made.snapshot("kept")
    assert "vmtasks restore a" in caught.value.hint


def not_sampled(guest: Guest, at: int) -> bool:
    """Whether samples leave this byte out."""
    image = guest.image(2)
    record = guest.builder.store.find(guest.builder.nodes()["phase:2"].digest)[0]
    before = image.read_bytes()[at : at + 6]
    damage(image, at)
    seen = guest.builder.store._sample_fault(record)
    damage(image, at, before)
    return not seen


# ---- moved, and killed


@pytest.mark.parametrize("way", WAYS)
def test_a_store_that_was_moved_is_followed(guest: Guest, way: str):
    made = machine(guest, way)
    before = shown(made.place.disk)
    moved = (guest.root / "store").rename(guest.root / "elsewhere")
    project = Project(guest.root, {**environ(guest), "VMTASKS_STORE": str(moved)})
    saved = project.machine("a").snapshot("kept") if way == "run" else Machine(project.config(), "a").snapshot("kept")
    assert disk.info(made.place.disk)["full-backing-filename"].startswith(str(moved))
    assert shown(made.place.disk) == before == shown(Machine(project.config(), "a").place.state.store.image(saved))


def test_killed_at_any_moment_a_machine_has_the_disk_that_its_record_says_or_none(guest: Guest):
    """A child that restores to another snapshot is killed before each file that it renames or removes."""
    made = machine(guest, "run")
    made.snapshot("other")
    seen = set()
    for moment in range(1, 60):
        made.restore("clean")
        pid = os.fork()
        if not pid:
            die_before(moment)
            made.restore("other")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        record = made.place.record()
        assert record is not None
        if made.place.disk.exists():
            found, _ = made.place.state.store.find(record.image, record.image_sha256)
            assert disk.info(made.place.disk)["full-backing-filename"] == str(made.place.state.store.image(found))
        seen.add((record.snapshot, made.place.disk.exists()))
        if status == 0:
            assert {("clean", True), ("other", False), ("other", True)} <= seen
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("it never ended")


def die_before(call: int) -> None:
    """Have this process killed before so many-th of its changes to a folder, and starts of a program."""
    calls = iter(range(1, call))

    def count(event: str, _args: object) -> None:
        if event in ("os.rename", "os.remove", "subprocess.Popen") and next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
