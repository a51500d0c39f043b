"""How much longer does `vmtasks start` take than QEMU and its guest by themselves? Prints both medians and their ratio.

    python benchmarks/start.py [--rounds N] [--image tiny]

`./doit guest=tiny auto_install` first. In turn, on one disk that was left in good order: the whole process `vmtasks
start`, which ends when it has logged in; and the same QEMU, started as it is, until the guest's SSH server has said its
first word, for which new connections are tried. Exit status 1 when the ratio is above the limit.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from timing import compare

from vmtasks.machines import Machine, MachineSpec, Project, start
from vmtasks.qemu import argv, events

LIMIT = 1.15
EVERY_S, SHARE, LISTEN_S = 0.25, 8, 60.0
BOOT_S = 300.0


def timed_start(machine: Machine) -> float:
    """Seconds that `vmtasks start` takes; the machine is stopped again."""
    words = [sys.executable, "-m", "vmtasks.cli", "start", machine.name]
    began = time.perf_counter()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    took_s = time.perf_counter() - began
    machine.stop()
    return took_s


def raw(machine: Machine) -> float:
    """Seconds from QEMU's start to the first word of the guest's server, on a copy of the machine's disk."""
    record = machine.place.record()
    assert record is not None
    port = free_port()
    copy = machine.folder / "raw.qcow2"
    shutil.copyfile(machine.place.disk, copy)
    events.prepare(machine.place.events)
    words = argv.command(replace(start.qemu_spec(machine.place, record, port), disk=copy.absolute()))
    began = time.perf_counter()
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as qemu:
        try:
            first_word(port, qemu)
            return time.perf_counter() - began
        finally:
            qemu.kill()


def free_port() -> int:
    """A loopback port that nobody holds at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_word(port: int, qemu: "subprocess.Popen[bytes]") -> None:
    """Wait until an SSH server has said its first word. New connections come often, but less often as time goes by.

    Each one costs the guest a process in the end, also those that were lost while it had no network.
    """
    spoken = threading.Event()

    def listen() -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), LISTEN_S) as sock:
            if sock.recv(4) == b"SSH-":
                spoken.set()

    began = time.monotonic()
    while not spoken.wait(max(EVERY_S, (time.monotonic() - began) / SHARE)):
        if qemu.poll() is not None or time.monotonic() - began > BOOT_S:
            raise SystemExit("QEMU did not come up by itself")
        threading.Thread(target=listen, daemon=True).start()


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", default="tiny")
    given = parser.parse_args()
    machine = Project.find(Path.cwd()).create(MachineSpec(image=given.image))
    times: dict[str, list[float]] = {"QEMU and the guest": [], "vmtasks start": []}
    try:
        machine.start()  # what is only done once
        machine.stop()
        for _ in range(given.rounds):
            times["QEMU and the guest"].append(raw(machine))
            times["vmtasks start"].append(timed_start(machine))
    finally:
        machine.remove()
    return compare(times, LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
