"""The DragonFlyBSD guest as data: its scripts are sound shell, and its phase CDs are what PFI needs."""

import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmtasks import proc
from vmtasks.build import Builder
from vmtasks.config import Config, load
from vmtasks.image import Job, spec
from vmtasks.machine.accel import Accel
from vmtasks.machine.argv import command
from vmtasks.model import Download
from vmtasks.store import MediaRecord, Store, write_record

TOP = Path(__file__).parents[2]
NUMBERS = (1, 2, 3)
ODD: dict[str, object] = {"user": "", "packages": ["bash", "rsync"], "directories": ["/a b/it's"], "observe": True}


def config(folder: Path, environ: Mapping[str, str] | None = None, **values: object) -> Config:
    """The shipped guest with a store and a state folder of its own; `values` override its [vars]."""
    variables = {"guest": "dragonfly", "store": str(folder / "store"), "dir": str(folder / "state")}
    made = load(TOP, variables, {"HOME": str(folder), **(environ or {})})
    return msgspec.structs.replace(made, vars={**made.vars, **values})


def rendered(folder: Path, **values: object) -> Builder:
    builder = Builder(config(folder, **values))
    for number in NUMBERS:
        builder.render(number)
    return builder


@pytest.mark.parametrize("values", [{}, ODD], ids=["as shipped", "other values"])
def test_rendered_scripts_are_sound_shell(tmp_path: Path, values: dict[str, object]):
    builder = rendered(tmp_path, **values)
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or "shellcheck"
    for number in NUMBERS:
        argv = [shellcheck, "-s", "sh", "-e", "SC2043,SC2154", str(builder.folder(number) / "phase.sh")]
        checked = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert checked.stdout == ""


def test_observations_are_made_only_when_asked_for(tmp_path: Path):
    plain, observing = rendered(tmp_path / "a"), rendered(tmp_path / "b", observe=True)
    for number in NUMBERS:
        assert not re.search(r"^observe ", (plain.folder(number) / "phase.sh").read_text(), re.MULTILINE)
        assert re.search(r"^observe ", (observing.folder(number) / "phase.sh").read_text(), re.MULTILINE)


def test_no_script_needs_bash_before_it_is_there(tmp_path: Path):
    builder = rendered(tmp_path)
    for number in (1, 2):
        for name in ("run.sh", "lib.sh", "phase.sh"):
            for line in (builder.folder(number) / name).read_text().splitlines():
                assert "bash" not in line.partition("#")[0] or line.startswith(
                    ("pkg_retry 4 install", "for package in")
                )


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar is not installed")
@pytest.mark.parametrize("number", NUMBERS)
def test_the_phase_cd_is_what_pfi_needs(tmp_path: Path, number: int):
    """Read by libarchive: names with Rock Ridge, modes, owner; the configuration names a script that may be run."""
    builder = rendered(tmp_path)
    write_media(builder)
    builder.phase_iso(number)
    listing = proc.run(["bsdtar", "-tvf", builder.iso(number)], timeout_s=20).stdout.splitlines()
    found = {words[-1]: (words[0], words[2], words[3]) for words in map(str.split, listing)}
    program, plain = ("-r-xr-xr-x", "0", "0"), ("-r--r--r--", "0", "0")
    assert {name: what for name, what in found.items() if name != "."} == {
        "lib.sh": plain,
        "pfi.conf": plain,
        "phase.sh": plain,
        "poweroff": plain,
        "run.sh": program,
        "token": plain,
    }
    out = tmp_path / "out"
    out.mkdir()
    proc.run(["bsdtar", "-xpf", builder.iso(number), "-C", out], timeout_s=20)
    assert (out / "pfi.conf").read_bytes() == b"pfi_script=run.sh\n"
    assert b"\r" not in b"".join(path.read_bytes() for path in out.iterdir())
    first = builder.iso(number).read_bytes()
    builder.iso(number).unlink()
    builder.phase_iso(number)
    assert builder.iso(number).read_bytes() == first


def write_media(builder: Builder) -> None:
    """A record of an installer, of which a phase CD takes no bytes."""
    record = MediaRecord(sha256="0" * 64, size=1, mtime_ns=1, origin="made up", recipe="made up")
    write_record(builder.installer_record, record)


@pytest.mark.parametrize("accel", ["hvf", "kvm", "tcg"])
@pytest.mark.parametrize("number", NUMBERS)
def test_the_drives_are_in_the_order_that_pfi_and_the_loader_rely_on(tmp_path: Path, number: int, accel: Any):
    """cd0 the installer, cd1 the phase, cd2 the installer, and the CD boots; later the disk boots, cd0 is the phase."""
    made = config(tmp_path)
    job = Job(
        config=made,
        store=Store(made.store_dir),
        accel=Accel(accel, "host", "", 1.0, 0.0),
        phase=made.guest.phases[number - 1],
        number=number,
        digest="0" * 64,
        token="0" * 16,
        isos={"installer": tmp_path / "installer.iso", "phase": tmp_path / "phase.iso"},
        below=None,
    )
    words = command(spec(job, tmp_path / "disk", tmp_path, None))
    drives = [word for word in words if word.startswith(("ide-cd,", "scsi-hd,"))]
    disk, *cds = drives
    files = [json.loads(word)["file"]["filename"] for word in words if word.startswith('{"driver": "raw"')]
    assert "serial=vmtasks0" in disk
    if number == 1:
        assert [cd.split(",")[1:3] for cd in cds] == [
            ["bus=ide.0", "unit=0"],
            ["bus=ide.0", "unit=1"],
            ["bus=ide.1", "unit=0"],
        ]
        assert [Path(file).name for file in files] == ["installer.iso", "phase.iso", "installer.iso"]
        assert cds[0].endswith("bootindex=0")
        assert disk.endswith("bootindex=1")
    else:
        assert [Path(file).name for file in files] == ["phase.iso"]
        assert disk.endswith("bootindex=0")
    assert "virtio-net-pci,netdev=net0,romfile=" in words
    assert not any("virtio-rng" in word for word in words)
    assert "-cpu" in words


@pytest.mark.parametrize(
    ("environ", "version"), [({}, "6.4.2"), ({"DFLY_VERSION": "6.4.0"}, "6.4.0"), ({"DFLY_VERSION": "6.6.0"}, "6.6.0")]
)
def test_the_version_names_file_and_folder(tmp_path: Path, environ: dict[str, str], version: str):
    made = config(tmp_path, environ)
    assert made.version == version
    assert made.guest_state.name == f"dragonfly-{version}"


def test_what_is_known_of_the_published_files():
    """Facts: the project's md5.txt, and what other users of the files have recorded."""
    installer = config(Path("/nowhere")).guest.installer
    assert isinstance(installer, Download)
    assert installer.file.format(version="6.4.2") == "dfly-x86_64-6.4.2_REL.iso.bz2"
    assert {version: len(known) for version, known in installer.digests.items()} == {
        "6.0.0": 1,
        "6.2.2": 1,
        "6.4.0": 2,
        "6.4.2": 3,
    }
    assert all(mirror.startswith("https://") for mirror in installer.mirrors)
