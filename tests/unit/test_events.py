"""QEMU's events in a file, on a real QEMU."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from phaserun import machine

from bootsector import hang, sector
from vmtasks.qemu import argv, events, qmp, vm
from vmtasks.qemu.argv import Spec
from vmtasks.qemu.events import Events

WAIT_S = 20.0


@contextmanager
def running(spec: Spec, output: Path) -> Iterator[vm.Pid]:
    pid = vm.launch(spec, output)
    try:
        yield pid
    finally:
        os.kill(pid.number, signal.SIGKILL)
        vm.wait_until(lambda: not pid.alive(argv.PROGRAM), WAIT_S)


@pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")
def test_each_reset_and_start_is_another_boot_and_a_pause_is_not(tmp_path: Path):
    spec = machine(tmp_path, sector(hang()), throwaway=False, events=tmp_path / "the, events")
    record, other = Events(spec.events), Events(spec.events)
    assert record.boot_marker() == "", "nothing is known before QEMU runs"
    with running(spec, tmp_path / "log"), qmp.connect(spec.qmp_socket, timeout_s=WAIT_S) as control:
        assert vm.wait_until(lambda: bool(record.boot_marker()), WAIT_S)
        first = record.boot_marker()
        assert not record.cpu_stopped()
        control.cmd("stop")
        assert vm.wait_until(record.cpu_stopped, WAIT_S)
        told = [line for line in (tmp_path / "the, events.out").read_bytes().splitlines() if b"event" in line]
        assert all(line.startswith(events.EVENT) for line in told), told
        control.cmd("cont")
        assert vm.wait_until(lambda: not record.cpu_stopped(), WAIT_S)
        assert (record.boot_marker(), other.boot_marker()) == (first, first)
        control.cmd("system_reset")
        assert vm.wait_until(lambda: record.boot_marker() != first, WAIT_S)
        assert other.boot_marker() == record.boot_marker(), "any number of readers, also beside a client of the socket"
        last = record.boot_marker()
    assert record.boot_marker() == last, "the record stays"
    spec.qmp_socket.unlink()
    with running(spec, tmp_path / "log"):
        assert vm.wait_until(lambda: bool(record.boot_marker()), WAIT_S)
        assert record.boot_marker() not in (first, last)
    shutil.rmtree(spec.qmp_socket.parent)


def test_a_line_that_is_not_whole_yet_is_left_for_later(tmp_path: Path):
    base = tmp_path / "events"
    events.prepare(base)
    record, path = Events(base), tmp_path / "events.out"
    seen = []
    for text in ('{"QMP": {}}\n{"return": {}}\n', '{"event": "RES', 'ET"}\n', '{"event": "STOP"}\n'):
        with path.open("a") as out:
            out.write(text)
        seen.append(record.boot_marker())
    assert seen[0] == seen[1] != seen[2] == seen[3]


@pytest.mark.parametrize(
    "damaged",
    [b'{"timestamp": {"sec', b"\n", b"\xff\xfe\0\0", b"[]", b"7", b'{"event": ["STOP"]}', b'"event"', b"[" * 100_000],
    ids=["cut", "empty", "binary", "list", "number", "no name", "text", "deep"],
)
def test_a_line_that_cannot_be_read_is_skipped(tmp_path: Path, damaged: bytes):
    base = tmp_path / "events"
    events.prepare(base)
    record, path = Events(base), tmp_path / "events.out"
    path.write_bytes(b'{"QMP": {}}\n' + damaged + b"\n")
    assert (record.cpu_stopped(), record.boot_marker()) == (False, Events(base).boot_marker())
    before = record.boot_marker()
    with path.open("ab") as out:
        out.write(b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\n' + damaged + b"\n")
        out.write(b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESET", "data": {}}\n')
    assert record.cpu_stopped()
    assert record.boot_marker() != before


def test_an_event_after_one_that_a_full_disk_has_cut_is_heard(tmp_path: Path):
    base = tmp_path / "events"
    events.prepare(base)
    whole = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\n'
    for cut in range(len(whole) - 1):
        (tmp_path / "events.out").write_bytes(whole[:cut] + whole)
        assert Events(base).cpu_stopped(), cut


def test_a_network_card_that_came_up_is_remembered_until_qemu_is_started_anew(tmp_path: Path):
    base = tmp_path / "events"
    record = Events(base)
    assert not record.network_up()
    events.prepare(base)
    assert not record.network_up()
    with (tmp_path / "events.out").open("ab") as out:
        out.write(b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "NIC_RX_FILTER_CHANGED"}\n')
        out.write(b'{"timestamp": {"seconds": 1, "microseconds": 3}, "event": "RTC_CHANGE"}\n')
    assert (record.network_up(), Events(base).network_up()) == (True, True)
    events.prepare(base)
    os.utime(tmp_path / "events.in", ns=(1, 1))
    assert not record.network_up()
