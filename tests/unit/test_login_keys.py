"""A private key that cannot log in anybody is told before a machine is started with it."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmtasks.config import load
from vmtasks.errors import StateError
from vmtasks.guest import keypair
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import keys, start
from vmtasks.machines.machine import Machine

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="OpenSSH is not installed")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that was never started."""
    places = {"VMTASKS_STORE": str(tmp_path / "store"), "VM_DIR": str(tmp_path / "state")}
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    made = Machine(load.without_project({"guest": "tiny"}, places), "a")
    made.folder.mkdir(parents=True)
    made.place.state.key.parent.mkdir(parents=True)
    keypair.make_pair(made.place.state.key, "store")
    return made


def record(machine: Machine, **values: object) -> MachineRecord:
    known = {"image": "0" * 64, "host_keys": ["ssh-ed25519 AAAA"], **values}
    return machine.place.write(
        MachineRecord(name="a", guest="tiny", snapshot="clean", image_sha256="", ssh_user="dev", **known)  # type: ignore[arg-type]
    )


def encrypt(key: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-P", "", "-f", key], check=True)


def other(key: Path) -> None:
    """Somebody's pair, of which only the private half was put here."""
    public = keypair.public_half(key).read_bytes()
    keypair.make_pair(key, "other")
    keypair.public_half(key).write_bytes(public)


def link_to_zero(key: Path) -> None:
    key.unlink()
    key.symlink_to("/dev/zero")


def folder(key: Path) -> None:
    key.unlink()
    key.mkdir()


HURT: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda key: key.chmod(0o644), "can be read by other users (its mode is 644)", "chmod 600 "),
    (lambda key: key.write_text("garbage\n"), "is invalid", "put it back"),
    (lambda key: key.write_bytes(os.urandom(4000)), "is invalid", "put it back"),
    (lambda key: key.write_text(key.read_text()[:150]), "is invalid", "put it back"),
    (lambda key: key.write_text(""), "is invalid", "put it back"),
    (lambda key: key.unlink(), "does not exist", "put it back"),
    (folder, "is no file", "put it back"),
    (link_to_zero, "is no file", "put it back"),
    (encrypt, "is encrypted, and no agent holds it", "ssh-add "),
    (other, "does not match ", "put it back"),
]


@pytest.mark.parametrize(("hurt", "says", "hint"), HURT, ids=[case[1] + str(n) for n, case in enumerate(HURT)])
def test_a_key_of_the_store_that_lets_nobody_in(
    machine: Machine, hurt: Callable[[Path], object], says: str, hint: str
) -> None:
    hurt(machine.place.state.key)
    with pytest.raises(StateError) as caught:
        start.boot(machine.place, record(machine))
    assert f"the private key {machine.place.state.key} {says}" in caught.value.message
    assert caught.value.hint.startswith(hint)
    assert not machine.place.qemu_log.exists(), "QEMU was not started"


def test_a_key_of_a_machine_that_lets_nobody_in(machine: Machine) -> None:
    keypair.make_pair(machine.place.own_key, "a")
    machine.place.own_key.write_text("garbage\n")
    machine.place.state.key.unlink()  # which is of no use to this one
    with pytest.raises(StateError) as caught:
        start.boot(machine.place, record(machine, own=True, key="own"))
    assert f"the private key {machine.place.own_key} is invalid" in caught.value.message


def test_an_encrypted_key_that_an_agent_holds(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        while subprocess.run(["ssh-add", "-q", machine.place.state.key], check=False, capture_output=True).returncode:
            assert agent.poll() is None
        encrypt(machine.place.state.key)
        try:
            keys.require_usable(machine.place.state.key)
        finally:
            agent.terminate()


def test_a_key_that_is_right_is_left_alone(machine: Machine) -> None:
    keys.require_usable(machine.place.state.key)
    keypair.public_half(machine.place.state.key).unlink()
    keys.require_usable(machine.place.state.key)
