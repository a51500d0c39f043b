"""Folders of this host in a guest whose kernel has 9p: tiny with Debian's generic kernel."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Cli

from conftest import Project, free_port

pytestmark = [pytest.mark.timeout(1800), pytest.mark.exhaustive]

GUEST_UID = 1000


@pytest.fixture
def cli(tmp_path: Path, store: Path) -> Iterator[Cli]:
    """A project whose guest is `nine`."""
    project = Project(tmp_path / "project", store)
    shutil.move(project.root / "phases/tiny", project.root / "phases/nine")
    for old, new in (
        ('name = "tiny"', 'name = "nine"'),
        ('"linux-image-cloud-amd64"', '"linux-image-amd64"'),
        ('    "fuse",', '    "9p",\n    "9pnet_virtio",\n    "fuse",'),
        ('    "ext4",', '    "crc32c_generic",\n    "ext4",'),
    ):
        project.edit("phases/nine/guest.toml", old, new)
    config = project.root / "config/vm.toml"
    config.write_text(re.sub(r'(?m)^guest = "\w+"', 'guest = "nine"', config.read_text()))
    project.name = "nine"
    project.doit("auto_install", timeout_s=1200).good()
    made = Cli(project)
    yield made
    made("rm", "--all", "--force")


def test_b16_binds_by_9p(cli: Cli, tmp_path: Path) -> None:
    for name in ("rw", "ro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from host").write_text(f"{name}\n")
    ours = os.getuid() == GUEST_UID
    cli.good(
        "run", "-d", "--name", "a", "--ssh-port", str(free_port()), *([] if ours else ["--user", "root"]),
        "--bind", f"{tmp_path}/rw:/work/rw", "--bind", f"{tmp_path}/ro:/work/ro:ro",
    )  # fmt: skip
    assert [bind["how"] for bind in cli.machine("a")["binds"]] == ["9p", "9p"]  # type: ignore[attr-defined]
    assert cli.good("ssh", "a", "cat '/work/rw/from host' '/work/ro/from host'") == "rw\nro\n"
    cli.good("ssh", "a", "echo guest >/work/rw/new")
    assert (tmp_path / "rw" / "new").read_text() == "guest\n"
    (tmp_path / "rw" / "new").write_text("host\n")
    assert cli.good("ssh", "a", "cat /work/rw/new") == "host\n"
    assert b"Read-only file system" in cli("exec", "--user", "root", "a", "touch", "/work/ro/x").stderr
    assert [path.name for path in (tmp_path / "ro").iterdir()] == ["from host"]
    assert not [path for path in (tmp_path / "rw").iterdir() if path.name.startswith(".vmtasks")]
