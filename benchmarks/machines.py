"""Compare what 100 machines on record cost `vmtasks ps`, and a command that has nothing to do with them.

    python benchmarks/machines.py [--rounds N] [--machines N]

Whole processes in a scratch project without QEMU, by the CPU time that they use, which a busy host changes little.
`ps` is compared with `vmtasks --version`, the other command with itself where there are no machines.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmtasks.images.workspace import MachineRecord
from vmtasks.store.records import write_record

PS_LIMIT, OTHER_LIMIT = 2.2, 1.15
VMTASKS = [sys.executable, "-m", "vmtasks.cli"]


def make(root: Path, number: int) -> None:
    """A stopped machine as `vmtasks run -d` records it."""
    folder = root / ".vm/run" / f"m{number}"
    folder.mkdir(parents=True)
    record = MachineRecord(
        name=folder.name, guest="tiny", snapshot="clean", image="a" * 64, image_sha256="b" * 64, ssh_user="dev",
        host_keys=[f"ssh-ed25519 {'A' * 68}"] * 2, family="tiny", own=True, memory=256 << 20, cpus=1, created=1e9,
    )  # fmt: skip
    write_record(folder / "machine.toml", record)


def cost(root: Path, *words: str) -> tuple[float, float]:
    """Seconds of CPU and of the clock that a command takes."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([*VMTASKS, *words], cwd=root, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    after, took = os.times(), time.perf_counter() - began
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, took


def main() -> int:
    """Exit status 1 above a limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--machines", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        rows = {
            "version": (Path(few), "--version"), "snapshots, none": (Path(few), "snapshots"),
            "snapshots, many": (Path(many), "snapshots"), "ps, many": (Path(many), "ps"),
        }  # fmt: skip
        for root in (Path(few), Path(many)):
            subprocess.run([*VMTASKS, "init", ".", "--guest", "tiny"], cwd=root, check=True, capture_output=True)
        for number in range(given.machines):
            make(Path(many), number)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(given.rounds):
            for name, (root, word) in rows.items():
                times[name].append(cost(root, word))
    cpu = {name: statistics.median(one for one, _ in values) for name, values in times.items()}
    for name, values in times.items():
        clock = statistics.median(one for _, one in values)
        print(f"{name:16} {cpu[name] * 1000:7.0f} ms of CPU, {clock * 1000:7.0f} ms")
    ps, other = cpu["ps, many"] / cpu["version"], cpu["snapshots, many"] / cpu["snapshots, none"]
    print(f"ps {ps:.2f} times --version, limit {PS_LIMIT}; snapshots {other:.2f} times, limit {OTHER_LIMIT}")
    return 0 if ps <= PS_LIMIT and other <= OTHER_LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
