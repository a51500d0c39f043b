"""Build steps on real QEMU with boot sectors: an installer CD that writes the disk, and a disk that goes on."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bootsector import ask, cd, phase, power_off, say, sector, wait_ticks, write_disk
from vmtasks.config.load import load
from vmtasks.errors import PhaseError
from vmtasks.images.steps import Builder, iso_token
from vmtasks.installer.installer import recipe as recipe_of
from vmtasks.media import disk
from vmtasks.qemu import argv
from vmtasks.qemu.accel import Accel
from vmtasks.store.records import MediaRecord, write_record

pytestmark = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")

KEY = "ssh-ed25519 AAAAC3Nza"
GUEST = """
name = "sector"
[machine]
memory = "16M"
disk_size = "4M"
cd_bus = "ide"
disk_bus = "virtio-blk"
[installer]
source = "packages"
packages = ["none"]
initramfs = {path = "boot/initrd.gz"}
iso = {label = "SECTOR", boot = "boot.bin"}
[[dialogue.loader]]
expect = "OK $"
send = "boot\\r"
[[phases]]
name = "1-install"
boot = "cd"
cds = ["installer", "phase"]
dialogue = "loader"
timeout_s = 10
silence_timeout_s = 5
[[phases]]
name = "2-provision"
boot = "disk"
cds = ["phase"]
timeout_s = 10
silence_timeout_s = 5
"""


class Guest:
    """A project with a guest whose installer does what a test asks for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folder = root / "phases/sector"
        folder.mkdir(parents=True)
        (root / "config").mkdir()
        (root / "config/vm.toml").write_text('guest = "sector"\n')
        (folder / "guest.toml").write_text(GUEST)
        for name in ("1-install", "2-provision"):
            (folder / f"{name}.sh.j2").write_text(f'step "{name}"\n')
        self.again()

    def again(self, **variables: str) -> Builder:
        """Read the configuration anew, as the next run of doit does."""
        config = load(self.root, variables, {"HOME": str(self.root), "VMTASKS_STORE": str(self.root / "store")})
        self.builder = Builder(config)
        self.builder.__dict__["accel"] = Accel("tcg", "max", "a test", 1.0, 0.0)
        return self.builder

    def token(self, number: int) -> str:
        builder = self.builder
        private = builder.key_of(number, builder.nodes())
        made = builder.render_files(number, builder.read(number), builder.public_line(private))
        return iso_token(builder.iso_entries(number, made))

    def prepare(self, *, second: bytes | None = None, verdict: str = "0 done", ticks: int = 0) -> None:
        """Do all that comes before the phases. `second` is what the disk does in phase 2, by default what is right.

        `ticks`: for how many ticks of the BIOS clock phase 1 goes on.
        """
        self.install(b"")
        for number in (1, 2):
            self.builder.render(number)
        last = second or phase(self.token(2), steps=("provision",), hostkey=KEY)
        self.install(
            cd(
                ask("OK ", "boot"),
                say(f"::vmtasks:{self.token(1)}:begin\r\n"),
                wait_ticks(ticks),
                write_disk(sector(say("from the disk\r\n"), last)),
                phase(self.token(1), steps=("install",), verdict=verdict),
            )
        )
        for number in (1, 2):
            self.builder.phase_iso(number)

    def install(self, image: bytes) -> None:
        """Have `image` as the installer, as `fetch` would."""
        sha256 = hashlib.sha256(image).hexdigest()
        path = self.builder.store.download(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        (recipe, parts), mtime_ns = recipe_of(self.builder.config), path.stat().st_mtime_ns
        record = MediaRecord(sha256=sha256, size=len(image), mtime_ns=mtime_ns, origin="", recipe=recipe, parts=parts)
        write_record(self.builder.store.root / "media" / f"{recipe}.toml", record)
        write_record(self.builder.installer_record, record)

    def boots(self) -> list[str]:
        """Names of the phases that were booted, in order."""
        journal = self.builder.home / "logs/boots.log"
        return [line.split()[1] for line in journal.read_text().splitlines()] if journal.exists() else []

    def image(self, number: int) -> Path:
        """The image that the record of phase `number` names."""
        named = self.builder.phase_record(number)
        return self.builder.store.image(self.builder.store.record(named.digest, named.sha256))

    def images(self) -> list[str]:
        return sorted(p.name for p in (self.builder.store.root / "images").iterdir())


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    made = Guest(tmp_path / "a project")
    made.prepare()
    return made


def both(guest: Guest) -> None:
    guest.builder.build(1)
    guest.builder.build(2)


def test_two_phases_become_two_images(guest: Guest):
    both(guest)
    guest.builder.snapshot()
    first, second = (guest.builder.store.find(guest.builder.nodes()[f"phase:{n}"].digest)[0] for n in (1, 2))
    assert (second.backing, second.backing_sha256) == (first.digest, first.chain)
    assert (first.host_keys, second.host_keys) == ([], [KEY])
    assert second.virtual_size == 4 << 20
    assert guest.boots() == ["1-install", "2-provision"]
    assert [guest.builder.why_stale(name) for name in ("fetch", "phase:1", "phase:2")] == ["", "", ""]
    assert guest.builder.image_fault(guest.builder.clean_record) == ""
    path = guest.builder.store.image(second)
    assert disk.info(path)["backing-filename"] == guest.builder.store.image(first).name
    assert "from the disk" in guest.builder.log(2).read_text()


def test_what_was_built_is_not_booted_again(guest: Guest):
    both(guest)
    both(guest)
    guest.again(memory="32M", cpus="2", port="auto")
    both(guest)
    shutil.rmtree(guest.builder.home / "logs")
    for number in (1, 2):
        guest.builder.record(number).unlink()
    both(guest)
    assert guest.boots() == []
    assert guest.builder.why_stale("phase:2") == ""


def test_going_back_to_an_earlier_script_boots_nothing(guest: Guest):
    both(guest)
    template = guest.root / "phases/sector/2-provision.sh.j2"
    before, digest = template.read_text(), guest.builder.nodes()["phase:2"].digest
    template.write_text(before + "# changed\n")
    guest.builder.render(2)
    assert guest.builder.nodes()["phase:2"].digest != digest
    template.write_text(before)
    guest.builder.render(2)
    guest.builder.phase_iso(2)
    both(guest)
    assert len(guest.boots()) == 2


def test_an_image_that_was_cut_is_said_and_made_again(guest: Guest, capsys: pytest.CaptureFixture[str]):
    both(guest)
    image = guest.image(2)
    image.chmod(0o644)
    os.truncate(image, image.stat().st_size - 1)
    assert "its record says" in guest.builder.why_stale("phase:2")
    capsys.readouterr()
    both(guest)
    assert "its record says" in capsys.readouterr().out
    assert guest.boots() == ["1-install", "2-provision", "2-provision"]
    assert guest.builder.why_stale("phase:2") == ""


def test_what_boots_is_what_the_digest_says(guest: Guest):
    """Another run may render between two steps of this one."""
    template = guest.root / "phases/sector/1-install.sh.j2"
    template.write_text(template.read_text() + "# edited\n")
    guest.builder.render(1)
    with pytest.raises(PhaseError):  # the installer of this test says the token of the script before
        guest.builder.build(1)
    assert guest.token(1).encode() in guest.builder.iso(1).read_bytes()


def test_a_disk_of_another_size_is_another_image(guest: Guest):
    both(guest)
    guest.again(disk="8M")
    both(guest)
    assert guest.boots() == ["1-install", "2-provision"] * 2
    assert disk.info(guest.image(2))["virtual-size"] == 8 << 20


def test_a_phase_that_fails_publishes_nothing_and_keeps_its_disk(tmp_path: Path):
    guest = Guest(tmp_path)
    guest.prepare(second=say("about to fail\r\n") + power_off())
    guest.builder.build(1)
    images = guest.images()
    with pytest.raises(
        PhaseError, match="phase 2-provision of sector: the guest powered off before its script"
    ) as caught:
        guest.builder.build(2)
    error, digest = caught.value, guest.builder.nodes()["phase:2"].digest
    assert (error.cause, error.log) == ("no-verdict", guest.builder.log(2))
    assert error.console == ("from the disk", "about to fail")
    assert guest.images() == images
    assert not guest.builder.record(2).exists()
    assert guest.builder.why_stale("phase:2") == "there is no record phase-2.toml"
    kept = guest.builder.store.failed(digest)
    disk.check(kept)
    look = Path(error.hint.split()[3])
    before = kept.read_bytes()
    subprocess.run(["sh", "-n", look], check=True)
    seen = subprocess.run([look, "boot"], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=20)
    assert b"about to fail" in seen.stdout
    assert kept.read_bytes() == before
    guest.prepare()
    both(guest)
    assert guest.builder.why_stale("phase:2") == ""


def test_a_first_phase_that_fails_says_where(tmp_path: Path):
    guest = Guest(tmp_path)
    guest.prepare(verdict="7 install")
    with pytest.raises(PhaseError, match=r"^phase 1-install of sector: its script exited with 7 at step 'install'\n"):
        guest.builder.build(1)
    assert guest.images() == []


def test_what_a_killed_run_left_does_not_disturb(guest: Guest):
    partial = guest.builder.store.partial(guest.builder.nodes()["phase:1"].digest)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"half an image")
    orphan = partial.with_name(f"{guest.builder.nodes()['phase:1'].digest}.{'0' * 16}.qcow2")
    orphan.write_bytes(b"an image without its record")
    both(guest)
    assert guest.builder.why_stale("phase:2") == ""
