"""QEMU's argv for each kind of machine, as files; and that the real QEMU takes them and listens on loopback only."""

import json
import shlex
import shutil
import subprocess
import time
from dataclasses import fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.errors import MachineError
from vmtasks.host import process
from vmtasks.media import disk
from vmtasks.qemu import argv, qmp
from vmtasks.qemu.argv import Spec, command

DATA = Path(__file__).parents[1] / "data/argv"
PATHS = {"disk", "console_socket", "console_log", "qmp_socket", "firmware_log", "pidfile"}
USUAL: dict[str, Any] = {
    "name": "tiny",
    "accel": "tcg",
    "cpu": "max",
    "machine_type": "pc",
    "memory": 256 << 20,
    "cpus": 1,
    "disk": "/vm/disk.qcow2",
    "disk_bus": "virtio-scsi",
    "disk_serial": "vmtasks0",
    "nic": "virtio-net-pci",
    "console_socket": "/run/console",
    "console_log": "/vm/console.log",
    "qmp_socket": "/run/qmp",
}
needs_qemu = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")


def spec(**changes: Any) -> Spec:
    values = {**USUAL, **changes}
    paths = {name: Path(values[name]) for name in PATHS & set(values) if values[name] is not None}
    return Spec(**{**values, **paths, "cds": tuple(map(Path, values.get("cds", ())))})


@pytest.mark.parametrize("path", sorted(DATA.glob("*.json")), ids=lambda path: path.stem)
def test_argv_is_as_the_file_says(path: Path):
    """A case is a file: `spec` is what differs from USUAL, `argv` is the expected command line in a shell's quoting."""
    case = json.loads(path.read_text())
    assert process.quote(command(spec(**case["spec"]))).split(" -") == shlex.join(
        shlex.split(" ".join(case["argv"]))
    ).split(" -")


def values_of(words: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == option]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12).filter(
    lambda t: t not in {".", ".."}
)


@given(TEXT)
def test_a_path_of_any_characters_stays_one_value(name: str):
    words = command(
        spec(
            disk=f"/d/{name}", cds=[f"/c/{name}"], console_log=f"/l/{name}", console_socket=f"/s/{name}",
            qmp_socket=f"/q/{name}", firmware_log=f"/f/{name}", pidfile=f"/p/{name}", events=f"/e/{name}",
        )
    )  # fmt: skip
    nodes = [json.loads(value) for value in values_of(words, "-blockdev")]
    assert [node["file"]["filename"] for node in nodes] == [f"/d/{name}", f"/c/{name}"]
    doubled = name.replace(",", ",,")
    serial, monitor, events, firmware = values_of(words, "-chardev")
    assert serial == f"socket,id=serial0,path=/s/{doubled},server=on,wait=off,logfile=/l/{doubled},logappend=on"
    assert monitor == f"socket,id=qmp0,path=/q/{doubled},server=on,wait=off"
    assert events == f"pipe,id=events0,path=/e/{doubled}"
    assert firmware == f"file,id=firmware,path=/f/{doubled}"
    assert values_of(words, "-pidfile") == [f"/p/{name}"]


@given(st.integers(1024, 65535) | st.none(), st.sampled_from(["user", "none"]), st.booleans())
def test_nothing_listens_but_on_loopback(port: int | None, network: str, throwaway: bool):  # noqa: FBT001
    words = command(spec(ssh_port=port, network=network, throwaway=throwaway))
    (netdev,) = values_of(words, "-netdev")
    assert netdev.count("hostfwd=") == (port is not None)
    assert ("restrict=on" in netdev) == (network == "none")
    if port is not None:
        assert f"hostfwd=tcp:127.0.0.1:{port}-:22" in netdev
    assert not {"-vnc", "-spice", "-qmp", "-monitor", "-gdb", "-s"} & set(words)
    assert all(
        value.startswith(("socket,", "file,")) and "host=" not in value for value in values_of(words, "-chardev")
    )


def test_every_machine_is_bare_and_in_the_sandbox():
    words = command(spec())
    assert {"-nodefaults", "-no-user-config"} <= set(words)
    assert values_of(words, "-sandbox") == [argv.SANDBOX]
    assert values_of(words, "-display") == ["none"]


def test_every_field_of_a_machine_is_in_its_argv():
    base = process.quote(command(spec()))
    other = {
        "name": "x", "accel": "kvm", "cpu": "host", "machine_type": "q35", "memory": 1 << 30, "cpus": 4, "disk": "/x",
        "disk_bus": "ide", "disk_serial": "x", "cds": ["/x"], "nic": "e1000", "network": "none", "ssh_port": 2222,
        "rng": False, "console_socket": "/x", "console_log": "/x", "qmp_socket": "/x", "firmware_log": "/x",
        "events": "/x", "mac": "02:00:00:00:00:01", "pidfile": "/x", "throwaway": True, "boot": "cd",
        "disk_cache": "none", "forwards": ((8080, 80),), "shares": (argv.Share("bind0", "/x"),),
    }  # fmt: skip
    only_with_cds = {"cd_bus"}
    assert {f.name for f in fields(Spec)} == set(other) | only_with_cds
    for name, value in other.items():
        assert process.quote(command(spec(**{name: value}))) != base, name
    assert command(spec(cds=["/x"], cd_bus="virtio-scsi")) != command(spec(cds=["/x"], cd_bus="ide"))


def test_k25_every_listener_is_on_loopback():
    words = command(spec(ssh_port=2222, forwards=((8080, 80), (0, 443))))
    (net,) = values_of(words, "-netdev")
    rules = [item for item in net.split(",") if item.startswith("hostfwd=")]
    assert rules == [
        "hostfwd=tcp:127.0.0.1:2222-:22", "hostfwd=tcp:127.0.0.1:8080-:80", "hostfwd=tcp:127.0.0.1:0-:443"
    ]  # fmt: skip


def test_a_folder_is_shared_only_when_asked_and_read_only_then():
    assert values_of(command(spec()), "-fsdev") == []
    words = command(spec(shares=(argv.Share("bind0", "/a,b", read_only=True), argv.Share("bind1", "/c"))))
    first, second = values_of(words, "-fsdev")
    assert "path=/a,,b," in first
    assert first.endswith("readonly=on")
    assert "readonly" not in second
    assert "virtio-9p-pci,fsdev=fs1,mount_tag=bind1" in values_of(words, "-device")


def test_the_terminal_machine_has_the_same_hardware():
    machine = spec(cds=["/a", "/b"], firmware_log="/f", pidfile="/p", ssh_port=2222)
    here, there = argv.on_terminal(machine), command(machine)
    for option in ("-machine", "-cpu", "-m", "-smp", "-blockdev", "-netdev"):
        assert values_of(here, option) == values_of(there, option)
    assert set(values_of(there, "-device")) - set(values_of(here, "-device")) == {
        "isa-debugcon,iobase=0x402,chardev=firmware"
    }
    assert not set(here) & {"-pidfile", "-chardev", "-mon"}
    assert values_of(here, "-serial") == ["mon:stdio"]
    assert values_of(here, "-sandbox") == values_of(there, "-sandbox")


def test_a_window_has_the_same_hardware_too():
    machine = spec(cds=["/a"], ssh_port=2222)
    here, there = argv.on_terminal(machine, "gtk"), argv.on_terminal(machine)
    assert values_of(here, "-display") == ["gtk"]
    assert values_of(here, "-sandbox") == [argv.WINDOW_SANDBOX]
    assert [w for w in here if w not in {"gtk", argv.WINDOW_SANDBOX}] == [
        w for w in there if w not in {"none", argv.SANDBOX}
    ]


# ---- the real thing


def listeners(pid: int) -> list[str]:
    said = subprocess.run(["ss", "-Hltnp"], capture_output=True, check=True, text=True).stdout
    return [line.split()[3] for line in said.splitlines() if f"pid={pid}," in line]


BUSES = [
    {"disk_bus": bus, "cd_bus": cd, "machine_type": kind}
    for bus, cd, kind in product(["virtio-scsi", "virtio-blk", "ide", "ahci"], ["virtio-scsi", "ide"], ["pc", "q35"])
]


@needs_qemu
@pytest.mark.parametrize("buses", BUSES, ids=lambda buses: "-".join(buses.values()))
def test_qemu_takes_every_combination_of_buses(buses: dict[str, str], tmp_path: Path):
    folder = tmp_path / "it's, a folder"
    folder.mkdir()
    disk.create(folder / "disk.qcow2", 1 << 20)
    cds = [folder / "a.iso", folder / "b, c.iso", folder / "a.iso"]
    for cd in cds:
        cd.write_bytes(b"\0" * 2048)
    machine = spec(
        **buses, disk=folder / "disk.qcow2", cds=cds, boot="cd", memory=16 << 20, name="a, b",
        console_socket=folder / "c", console_log=folder / "log, 1", qmp_socket=folder / "q",
        firmware_log=folder / "fw, 1", pidfile=folder / "pid, 1",
    )  # fmt: skip
    with process.spawn([*command(machine), "-S"], pipe=True, merge=True) as child:
        try:
            with qmp.connect(machine.qmp_socket, timeout_s=5) as control:
                inserted = {b["qdev"]: b["inserted"]["node-name"] for b in control.cmd("query-block")}
                assert sorted(inserted.values()) == ["cd0", "cd1", "cd2", "disk0"]
                control.cmd("quit")
        except Exception as error:
            raise AssertionError(child.communicate(timeout=5)[0].decode()) from error
        assert child.wait(5) == 0
    assert (folder / "log, 1").exists()
    assert (folder / "fw, 1").exists()


@needs_qemu
@pytest.mark.skipif(not shutil.which("ss"), reason="ss (iproute2) is not installed")
def test_qemu_listens_on_loopback_only(tmp_path: Path):
    disk.create(tmp_path / "disk.qcow2", 1 << 20)
    for port in range(22230, 22260):
        machine = spec(
            disk=tmp_path / "disk.qcow2", ssh_port=port, console_socket=tmp_path / "c", console_log=tmp_path / "l",
            qmp_socket=tmp_path / "q", memory=16 << 20,
        )  # fmt: skip
        with process.spawn([*command(machine), "-S"], pipe=True, merge=True) as child:
            end = time.monotonic() + 5
            while child.poll() is None and not (found := listeners(child.pid)) and time.monotonic() < end:
                time.sleep(0.05)
            if child.poll() is None:
                assert found == [f"127.0.0.1:{port}"]
                return
            assert b"Could not set up host forwarding rule" in child.stdout.read()
    raise AssertionError("no port was free")


@needs_qemu
@pytest.mark.parametrize(
    ("mode", "throwaway", "cache"),
    [
        ("writeback", False, {"writeback": True, "direct": False, "no-flush": False}),
        ("writeback", True, {"writeback": True, "direct": False, "no-flush": True}),
        ("none", False, {"writeback": True, "direct": True, "no-flush": False}),
        ("unsafe", False, {"writeback": True, "direct": False, "no-flush": True}),
    ],
)
def test_the_cache_of_the_disk(mode: str, throwaway: bool, cache: dict[str, bool], tmp_path: Path):  # noqa: FBT001
    """As QEMU itself says what it does."""
    disk.create(tmp_path / "disk.qcow2", 1 << 20)
    machine = spec(
        disk=tmp_path / "disk.qcow2", disk_cache=mode, throwaway=throwaway, memory=16 << 20,
        console_socket=tmp_path / "c", console_log=tmp_path / "l", qmp_socket=tmp_path / "q",
    )  # fmt: skip
    with process.spawn([*command(machine), "-S"], pipe=True, merge=True) as child:
        try:
            with qmp.connect(machine.qmp_socket, timeout_s=5, ended=lambda: child.poll() is not None) as control:
                blocks = control.cmd("query-block")
        except MachineError:
            said = child.communicate(timeout=5)[0].decode()
            if "O_DIRECT" in said:
                pytest.skip("the file system of the tests has no direct access")
            raise AssertionError(said) from None
    assert [block["inserted"]["cache"] for block in blocks if block.get("inserted")] == [cache]
