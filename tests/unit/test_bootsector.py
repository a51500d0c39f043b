"""Each action of the boot sector kit, on a real QEMU."""

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import bootsector
from bootsector import (
    ask,
    cd,
    debug_exit,
    forever,
    hang,
    phase,
    power_off,
    reboot,
    say,
    sector,
    triple_fault,
    wait_key,
    wait_ticks,
    write_disk,
)
from vmtasks.host import process

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")
LIMIT_S = 20.0


class Guest:
    """A QEMU whose COM1 is on its stdin and stdout."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.text = ""
        self.end_s = time.monotonic() + LIMIT_S

    def until(self, text: str) -> str:
        """Read until `text` has come (or, with an empty one, to the end); return all that came."""
        while not text or text not in self.text:
            assert select.select([self.child.stdout], [], [], max(0, self.end_s - time.monotonic()))[0], self.text
            data = os.read(self.child.stdout.fileno(), 4096)
            if not data:
                assert not text, self.text
                break
            self.text += data.decode()
        return self.text

    def type(self, text: str) -> None:
        self.child.stdin.write(text.encode())
        self.child.stdin.flush()

    def status(self) -> int:
        return self.child.wait(max(0, self.end_s - time.monotonic()))


@contextmanager
def boot(image: bytes, folder: Path, *options: str, disc: bool = False) -> Iterator[Guest]:
    file = folder / "image"
    file.write_bytes(image)
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-m", "16", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-monitor", "none", "-serial", "stdio", *options]
    argv += ["-drive", f"file={file},format=raw,{'media=cdrom' if disc else 'index=0'}"]
    with process.spawn(argv, pipe=True, stdin=True) as child:
        try:
            yield Guest(child)
        finally:
            child.kill()


def test_say_and_power_off(tmp_path: Path):
    with boot(sector(say("hello\r\n"), say("::x\r\n"), power_off()), tmp_path) as guest:
        assert guest.until("") == "hello\r\n::x\r\n"
        assert guest.status() == 0


def test_actions_that_fit_stay_in_one_sector():
    assert len(sector(say("short"))) == 512
    assert len(sector(say("x" * 300))) == 1024


@pytest.mark.parametrize("size", [200, 500, 3000, 32000])
def test_long_text_in_more_sectors(size: int, tmp_path: Path):
    text = "".join(f"{n:07d}\n" for n in range(size // 8))
    with boot(sector(say(text), power_off()), tmp_path) as guest:
        assert guest.until("") == text


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        sector(say("x" * 40000))
    with pytest.raises(ValueError, match="zero byte"):
        say("a\0b")


@pytest.mark.parametrize("pad", [0, 600])
def test_ask_goes_on_only_after_the_right_line(pad: int, tmp_path: Path):
    image = sector(say("." * pad), ask("OK ", "set console=comconsole"), ask("OK ", "boot"), say("on\r\n"), power_off())
    with boot(image, tmp_path) as guest:
        guest.until("OK ")
        guest.type("bo\r")
        guest.until("unknown command\r\nOK ")
        guest.type("\r\n")
        guest.until("OK \r\nOK \r\nOK ")
        guest.type("set console=comconsole2\r")
        guest.until("comconsole2\r\nunknown command\r\nOK ")
        guest.type("set console=comconsole\r")
        guest.until("comconsole\r\nOK ")
        guest.type("boot\r")
        assert guest.until("").endswith("OK boot\r\non\r\n")
        assert guest.status() == 0


def test_an_overlong_line_is_harmless(tmp_path: Path):
    with boot(sector(ask("OK ", "boot"), power_off()), tmp_path) as guest:
        guest.until("OK ")
        guest.type("x" * 1000 + "\r")
        guest.until("unknown command\r\nOK ")
        guest.type("boot\n")
        assert guest.status() == 0


def test_wait_key(tmp_path: Path):
    with boot(sector(say("menu:"), wait_key("9"), say("prompt"), power_off()), tmp_path) as guest:
        guest.until("menu:")
        guest.type("1289")
        assert guest.until("") == "menu:prompt"


def test_wait_ticks(tmp_path: Path):
    with boot(sector(say("a"), wait_ticks(10), say("b"), power_off()), tmp_path) as guest:
        guest.until("a")
        begin_s = time.monotonic()
        guest.until("ab")
        assert 0.4 < time.monotonic() - begin_s < 5


@pytest.mark.parametrize("action", [reboot(), triple_fault()], ids=["reboot", "triple_fault"])
def test_resets(action: bytes, tmp_path: Path):
    with boot(sector(say("up\r\n"), action), tmp_path) as guest:
        guest.until("up\r\nup\r\n")
    with boot(sector(say("up\r\n"), action), tmp_path, "-no-reboot") as guest:
        assert guest.until("") == "up\r\n"
        assert guest.status() == 0


@pytest.mark.parametrize("how", ["idle", "dead", "busy"])
def test_hang(how: str, tmp_path: Path):
    with boot(sector(say("before"), hang(how), say("after")), tmp_path) as guest:
        guest.until("before")
        time.sleep(0.3)
        assert guest.child.poll() is None
        guest.child.kill()
        assert guest.until("") == "before"


def test_the_end_of_the_actions_hangs(tmp_path: Path):
    with boot(sector(say("before")), tmp_path) as guest:
        guest.until("before")
        time.sleep(0.3)
        assert guest.child.poll() is None


@pytest.mark.parametrize("code", [0, 3, 127])
def test_debug_exit(code: int, tmp_path: Path):
    with boot(sector(debug_exit(code)), tmp_path, "-device", "isa-debug-exit,iobase=0x501,iosize=1") as guest:
        assert guest.status() == code * 2 + 1


def test_forever(tmp_path: Path):
    with boot(sector(forever(say("tick\r\n"), wait_ticks(1))), tmp_path) as guest:
        guest.until("tick\r\n" * 4)


def test_a_whole_phase(tmp_path: Path):
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
    program = phase("t0k", steps=("one", "two"), hostkey=key, verdict="3 false")
    with boot(sector(program), tmp_path) as guest:
        lines = guest.until("").splitlines()
    body = ["begin", "step one", "step two", f"hostkey {key}", "exit 3 false"]
    assert lines == [f"::vmtasks:t0k:{line}" for line in body]


@pytest.mark.parametrize("pad", [0, 5000])
def test_boots_as_cd(pad: int, tmp_path: Path):
    image = cd(say("x" * pad + "cd\r\n"), power_off(), files={"PFI.CON": b"pfi_script=run.sh\n"})
    with boot(image, tmp_path, disc=True) as guest:
        assert guest.until("") == "x" * pad + "cd\r\n"


BUSES = {
    "ide": ["-device", "ide-hd,drive=d"],
    "virtio-blk": ["-device", "virtio-blk-pci,drive=d"],
    "virtio-scsi": ["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=d"],
}


@pytest.mark.parametrize("bus", BUSES)
def test_a_cd_installs_a_disk_that_boots(bus: str, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    installed = sector(say("y" * 1000), say("installed\r\n"), power_off())
    drive = ["-blockdev", f"raw,node-name=d,file.driver=file,file.filename={disk}", *BUSES[bus]]
    with boot(
        cd(write_disk(installed), say("done\r\n"), power_off()), tmp_path, *drive, "-boot", "d", disc=True
    ) as guest:
        assert guest.until("") == "done\r\n"
        assert guest.status() == 0
    assert disk.read_bytes()[: len(installed)] == installed
    with boot(disk.read_bytes(), tmp_path) as guest:
        assert guest.until("") == "y" * 1000 + "installed\r\n"


def test_write_disk_without_a_disk_says_so(tmp_path: Path):
    with boot(cd(write_disk(b"x"), say("done\r\n")), tmp_path, disc=True) as guest:
        guest.until("cannot write the disk")
        assert "done" not in guest.text


@pytest.mark.skipif(not shutil.which("nasm"), reason="nasm is not installed")
def test_listing_is_what_nasm_makes_of_it(tmp_path: Path):
    (tmp_path / "a.asm").write_text("\n".join(text for _, text in bootsector.LISTING) + "\n")
    process.run(["nasm", "-f", "bin", "-o", tmp_path / "a.bin", tmp_path / "a.asm"], timeout_s=10)
    code = b"".join(bytes.fromhex(piece) for piece, _ in bootsector.LISTING)
    assert (tmp_path / "a.bin").read_bytes() == code
