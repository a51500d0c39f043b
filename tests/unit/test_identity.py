"""What tells a machine from others of its image; the scripts that give it to a guest, by real shells on real keys."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.config.tables import NAME
from vmtasks.guest import keypair
from vmtasks.machines import identity
from vmtasks.machines.identity import HostKey

SHELLS = {
    name: [path, *words]
    for name, words in {"sh": (), "dash": (), "bash": (), "busybox": ("sh",)}.items()
    if (path := shutil.which(name))
}
needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="OpenSSH is not installed")


# -- what it is made from


def test_the_address_is_made_from_the_folder_of_the_machine():
    places = [Path("/p/.vm/run/a"), Path("/p/.vm/run/b"), Path("/q/.vm/run/a")]
    macs = [identity.mac(place) for place in places]
    assert macs == [identity.mac(place) for place in places], "the same each time"
    assert len(set(macs)) == 3
    for mac in macs:
        assert re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac)
        assert int(mac[:2], 16) & 3 == 2, "locally administered, and of one card"


@given(st.from_regex(NAME, fullmatch=True))
def test_every_name_of_a_machine_makes_a_host_name(name: str):
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", identity.hostname(name))


@pytest.mark.parametrize(
    ("name", "expected"), [("tiny-1", "tiny-1"), ("dragonfly-6.4.2", "dragonfly-6-4-2"), ("a_b.", "a-b")]
)
def test_a_name_stays_recognisable(name: str, expected: str):
    assert identity.hostname(name) == expected


# -- the host name, in the guest


def run(shell: str, text: str, place: Path, *, stdin: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as the guest would, with a `hostname` that writes down what it is given."""
    tool = place / "bin/hostname"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" >{place}/now\n')
    tool.chmod(0o755)
    env = {"PATH": f"{tool.parent}:{os.environ['PATH']}", **env}
    return subprocess.run(
        [*SHELLS[shell], "-c", text], env=env, input=stdin, capture_output=True, text=True, check=False, timeout=30
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            {"hostname": "debian\n", "hosts": "127.0.0.1 localhost\n127.0.1.1\tdebian.home debian\n::1 debian\n"},
            {"hostname": "a-1\n", "hosts": "127.0.0.1 localhost\n127.0.1.1 a-1\n::1 debian\n"},
        ),
        (
            {"rc.conf": "sshd_enable=YES\nhostname=dfly.home\n# hostname=old\nifconfig=DHCP\n", "hosts": "::1 x\n"},
            {"rc.conf": 'sshd_enable=YES\n# hostname=old\nifconfig=DHCP\nhostname="a-1"\n', "hosts": "::1 x\n"},
        ),
        ({"rc.conf": ""}, {"rc.conf": 'hostname="a-1"\n'}),
        ({}, {}),
    ],
    ids=["Debian", "BSD", "BSD without a name", "nothing written down"],
)
def test_the_host_name_is_set_for_good(shell: str, before: dict[str, str], after: dict[str, str], tmp_path: Path):
    etc = tmp_path / "etc"
    etc.mkdir()
    for name, text in before.items():
        (etc / name).write_text(text)
        (etc / name).chmod(0o640)
    for _ in range(2):
        done = run(shell, identity.HOSTNAME, tmp_path, name="a-1", etc=str(etc))
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "now").read_text() == "a-1\n"
        assert {path.name: path.read_text() for path in etc.iterdir()} == after
    assert {path.stat().st_mode & 0o777 for path in etc.iterdir()} <= {0o640}


def test_a_host_name_that_the_kernel_refuses_is_written_nowhere(tmp_path: Path):
    (tmp_path / "hostname").write_text("old\n")
    text = f"hostname() {{ echo 'hostname: no' >&2; return 1; }}\n{identity.HOSTNAME}"
    done = run("sh", text, tmp_path, name="a", etc=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "hostname: no\n")
    assert (tmp_path / "hostname").read_text() == "old\n"


# -- the host keys, in the guest


def host_key(folder: Path, kind: str) -> HostKey:
    path = folder / f"made-{kind}"
    keypair.make_pair(path, "a", (kind,))
    return HostKey(kind, path.read_text(), " ".join(keypair.public_half(path).read_text().split()[:2]))


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A guest's /etc/ssh, as `ssh-keygen -A` leaves it."""
    made = tmp_path / "ssh"
    made.mkdir()
    for kind in ("ed25519", "ecdsa"):
        keypair.make_pair(made / f"ssh_host_{kind}_key", "image", (kind,))
    (made / "sshd_config").write_text("")
    return made


@needs_ssh
@pytest.mark.parametrize("shell", SHELLS)
def test_host_keys_are_put_in_place_whole(shell: str, etc: Path, tmp_path: Path):
    names = sorted(path.name for path in etc.iterdir())
    fresh = [host_key(tmp_path, kind) for kind in ("ecdsa", "ed25519")]
    done = run(shell, identity.INSTALL, tmp_path, stdin=identity.install_input(fresh), folder=str(etc))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in etc.iterdir()) == names, "nothing is left over"
    for key in fresh:
        private = etc / f"ssh_host_{key.kind}_key"
        assert private.read_text() == key.private
        assert private.stat().st_mode & 0o777 == 0o600
        assert private.with_name(f"{private.name}.pub").stat().st_mode & 0o777 == 0o644
        shown = subprocess.check_output(["ssh-keygen", "-y", "-f", private], text=True).split()
        assert " ".join(shown[:2]) == key.public == private.with_name(f"{private.name}.pub").read_text().strip()


@needs_ssh
def test_a_guest_that_lacks_one_of_them_keeps_all(etc: Path, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in etc.iterdir()}
    fresh = [host_key(tmp_path, kind) for kind in ("ecdsa", "rsa")]
    done = run("sh", identity.INSTALL, tmp_path, stdin=identity.install_input(fresh), folder=str(etc))
    assert (done.returncode, done.stderr) == (identity.NOT_THERE, f"there is no {etc}/ssh_host_rsa_key\n")
    assert {path.name: path.read_bytes() for path in etc.iterdir()} == before


@needs_ssh
def test_a_stream_that_is_cut_replaces_nothing(etc: Path, tmp_path: Path):
    """The connection broke in the middle of the last key."""
    before = {path.name: path.read_bytes() for path in etc.glob("*key*")}
    fresh = [host_key(tmp_path, kind) for kind in ("ecdsa", "ed25519")]
    text, first = identity.install_input(fresh), len(str(fresh[0]))
    for cut in (0, 5, 300, first - 1, first, first + 8, first + 200, len(text) - 6, len(text) - 4):
        done = run("sh", identity.INSTALL, tmp_path, stdin=text[:cut], folder=str(etc))
        assert done.returncode == 1, cut
        assert {name: (etc / name).read_bytes() for name in before} == before, cut


def test_the_types_that_the_image_shows_are_the_types_that_are_made():
    shown = ["ssh-rsa A", "ssh-ed25519 B", "ssh-dss C", "ecdsa-sha2-nistp384 D", "ssh-ed25519 E"]
    assert identity.key_kinds(shown) == [("ecdsa", "-b", "384"), ("ed25519",), ("rsa",)]
