"""The DragonFlyBSD guest as data: its scripts are sound shell, and its phase CDs are what PFI needs."""

import bz2
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from amount import cases
from httpserver import Reply, serving
from tools import SHELLCHECK
from vmtasks.config.load import Config, load
from vmtasks.config.tables import Download
from vmtasks.host import process
from vmtasks.images.make import Job, spec
from vmtasks.images.steps import Builder
from vmtasks.qemu.accel import Accel
from vmtasks.qemu.argv import command
from vmtasks.store.records import MediaRecord, write_record
from vmtasks.store.store import Store

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
    for number in NUMBERS:
        argv = [SHELLCHECK, "-s", "sh", "-e", "SC2043,SC2154", str(builder.folder(number) / "phase.sh")]
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
    listing = process.run(["bsdtar", "-tvf", builder.iso(number)], timeout_s=20).stdout.splitlines()
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
    process.run(["bsdtar", "-xpf", builder.iso(number), "-C", out], timeout_s=20)
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
        parts={},
        key=tmp_path / "key",
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


# -- `doit fetch` of the default guest, from a mirror that has a made-up ISO under the real name

FILE = "dfly-x86_64-6.4.2_REL.iso.bz2"
ISO = random.Random(642).randbytes(3_000_000)  # noqa: S311
PACKED = bz2.compress(ISO)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The shipped guest with the made-up file's digests in place of the real ones, and nothing else changed."""
    root = tmp_path / "project"
    shutil.copytree(TOP / "phases/dragonfly", root / "phases/dragonfly")
    (root / "config").mkdir()
    (root / "config/vm.toml").write_text("")
    (root / "dodo.py").write_text("from vmtasks.tasks import *  # noqa: F403\n")
    guest = root / "phases/dragonfly/guest.toml"
    text = guest.read_text()
    for known, data, algorithm in (
        ("906095312c4a4ac0577fb91d5eb87033", PACKED, "md5"),
        ("fdab09ac37cf427b8c01de5d54bfd1d7", ISO, "md5"),
        ("373150a21eeb7ce0f20c7faf1b8129145bf3bf0463a45d0dc18aad274f7ed661", PACKED, "sha256"),
    ):
        assert known in text
        text = text.replace(known, hashlib.new(algorithm, data).hexdigest())
    guest.write_text(text.replace('"6.4.2" = 784334848', f'"6.4.2" = {len(ISO)}'))
    return root


def doit(project: Path, *words: str, store: Path | None = None, **environ: str) -> tuple[int, str]:
    """Run a real doit; its status and all that it printed."""
    ours = re.compile(r"(VM|VMTASKS|DFLY)_|\w+_proxy$", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    env = {**kept, "VMTASKS_STORE": str(store or project.parent / "store"), "PYTHONPATH": str(TOP), **environ}
    argv = [sys.executable, "-m", "doit", *words]
    done = subprocess.run(
        argv, cwd=project, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def isos(store: Path) -> list[bytes]:
    """What the store would take for an installer."""
    return [path.read_bytes() for path in store.glob("downloads/*") if re.fullmatch(r"[0-9a-f]{64}", path.name)]


HALF = len(PACKED) // 2


@pytest.mark.parametrize(
    "replies",
    cases(
        [Reply(status=503), Reply(cut_after=9)],
        more=[[], [Reply(cut_after=HALF)], [Reply(cut_after=HALF), Reply(ranges=False)]],
    ),
    ids=["overloaded, then cut", "good", "cut", "cut, then Range refused"],
)
def test_fetch_gets_there(project: Path, replies: list[Reply]):
    with serving({FILE: PACKED}, *replies) as site:
        status, said = doit(project, "fetch", DFLY_MIRROR=f"{site.base}/")
    assert status == 0, said
    assert isos(project.parent / "store") == [ISO]
    record = tomllib.loads((project / ".vm/dragonfly-6.4.2/installer.toml").read_text())
    assert record["sha256"] == hashlib.sha256(ISO).hexdigest()
    status, said = doit(project, "fetch", DFLY_MIRROR="http://127.0.0.1:9/")
    assert status == 0, f"offline, with the installer in the store: {said}"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    cases(
        (bz2.compress(b"another"), 200, r"sha256|md5"),
        more=[
            (b"", 404, r"404"),
            (b"<html>no such file</html>", 200, r"HTML|bz2"),
            (PACKED[:HALF], 200, r"ends in the middle of its bz2 data"),
        ],
    ),
    ids=["wrong digest", "404", "a page instead of a file", "truncated on the mirror"],
)
def test_fetch_takes_nothing_else_for_the_installer(project: Path, body: bytes, status: int, says: str):
    with serving({}) as site:
        site.usual = Reply(
            status=status, body=body, content_type="text/html" if b"html" in body else "application/x-bzip2"
        )
        ended, said = doit(project, "fetch", DFLY_MIRROR=f"{site.base}/")
    assert ended == 1, said
    assert re.search(says, said), said
    assert "hint:" in said
    assert isos(project.parent / "store") == []
    assert not (project / ".vm/dragonfly-6.4.2/installer.toml").exists()


def test_fetch_on_a_full_disk(project: Path, small_disk: Path):
    with serving({FILE: PACKED}) as site:
        status, said = doit(project, "fetch", store=small_disk / "store", DFLY_MIRROR=f"{site.base}/")
    assert status == 1
    assert re.search(r"needs about .* where .* are free", said), said
    assert "VMTASKS_STORE" in said
    assert isos(small_disk / "store") == []


def test_versions_stand_side_by_side(project: Path):
    other = bz2.compress(b"CD001 of 6.6.0")
    sums = f"MD5 (dfly-x86_64-6.6.0_REL.iso.bz2) = {hashlib.md5(other).hexdigest()}\n"  # noqa: S324
    with serving({FILE: PACKED, "dfly-x86_64-6.6.0_REL.iso.bz2": other, "md5.txt": sums.encode()}) as site:
        for environ in ({}, {"DFLY_VERSION": "6.6.0"}):
            status, said = doit(project, "fetch", DFLY_MIRROR=site.base, **environ)
            assert status == 0, said
        assert "md5 is taken from" in said
    assert sorted(path.parent.name for path in project.glob(".vm/*/installer.toml")) == [
        "dragonfly-6.4.2",
        "dragonfly-6.6.0",
    ]
    assert sorted(isos(project.parent / "store")) == sorted([ISO, b"CD001 of 6.6.0"])
