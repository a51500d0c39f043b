"""The ports of a machine, on a real QEMU whose guest never comes up."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import SO_REUSEADDR, SOL_SOCKET, socket

import msgspec
import pytest

from vmtasks.config import load
from vmtasks.errors import MachineError, SshError
from vmtasks.guest import keypair
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import start
from vmtasks.machines.machine import Machine
from vmtasks.media import disk
from vmtasks.qemu import argv, vm

pytestmark = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")

STRANGER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIII"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with an empty disk, for which a second is long enough."""
    places = {"VMTASKS_STORE": str(tmp_path / "store"), "VM_DIR": str(tmp_path / "state"), "VM_ACCEL": "tcg"}
    base = load.without_project({"guest": "tiny"}, places)
    short = msgspec.structs.replace(base.guest.ssh, ready_timeout_s=0.1)
    base = msgspec.structs.replace(base, guest=msgspec.structs.replace(base.guest, ssh=short))
    made = Machine(base, "a")
    made.folder.mkdir(parents=True)
    made.place.state.key.parent.mkdir(parents=True)
    keypair.make_pair(made.place.state.key, "store")
    disk.create(made.place.disk, 1 << 20)
    yield made
    vm.end_stray(made.place.qmp)
    shutil.rmtree(made.place.sockets)


def record(machine: Machine, **values: object) -> MachineRecord:
    """A machine of `vmtasks run` that was never started."""
    made = MachineRecord(
        name="a", guest="tiny", snapshot="clean", image="0" * 64, image_sha256="", ssh_user="dev",
        host_keys=[STRANGER], own=True,
    )  # fmt: skip
    return machine.place.write(msgspec.structs.replace(made, **values))


@contextmanager
def held(*ports: int) -> Iterator[None]:
    """Listeners on these loopback ports, but where there is one already."""
    with ExitStack() as stack:
        for port in ports:
            listener = stack.enter_context(socket())
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            listener.listen()
        yield


def boot_with(machine: Machine) -> MachineRecord:
    """Start it, in vain; returns what its record says then."""
    there = machine.place.record()
    assert there is not None
    with pytest.raises(SshError, match="did not accept SSH"):
        start.boot(machine.place, there)
    there = machine.place.record()
    assert there is not None
    return there


def given(there: MachineRecord) -> list[int]:
    """The ports of this host that lead to the guest's 80."""
    return [int(text.partition(":")[0]) for text in there.forwards if text.endswith(":80")]


def test_a_port_that_was_left_open_is_left_open_at_the_next_start(machine: Machine):
    record(machine, forwards=["0:80"])
    (first,) = given(boot_with(machine))
    assert first > 0
    with held(first):
        (second,) = given(boot_with(machine))
    assert second not in (0, first)


def test_a_port_that_was_asked_for_is_asked_for_again(machine: Machine):
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    record(machine, forwards=[f"{port}:80", "0:80"])
    assert port in given(boot_with(machine))
    there = machine.place.record()
    assert there is not None
    with held(port), pytest.raises(MachineError, match=f"port {port}, the host's side of a forward, is taken"):
        start.boot(machine.place, there)


def test_when_the_range_is_used_up_any_free_port_will_do(machine: Machine):
    usual = (start.FIRST_PORT, *start.FALLBACK_PORTS)
    record(machine, forwards=["0:22"])
    with held(*usual):
        there = boot_with(machine)
    assert there.ssh_port not in (0, *usual)
    assert there.forwards != [f"{there.ssh_port}:22"], "each has a port of its own"
    assert there.forwards[0].endswith(":22")
