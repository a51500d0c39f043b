"""Compare vmtasks.guest with plain OpenSSH through a ControlMaster, on one running machine. Prints ratios.

    python benchmarks/ssh.py [--rounds N] [--mib N] [guest=tiny ...]

`./doit start` first. Both sides work in turn: how long `true` takes on an open connection, one by one and in a row; how
fast a file goes into the guest and comes back, made durable where it arrives, by both; what a command costs that is
only waited for. Exit status 1 when a figure misses its limit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmtasks.config.load import load
from vmtasks.errors import VmTasksError
from vmtasks.guest import client, files
from vmtasks.guest.ssh import Target
from vmtasks.machines import Machine

LIMITS = {"true": 1.0, "row": 1.1, "in": 0.9, "out": 0.9, "cpu": 0.02}
"""`true`, `row`: ours to theirs, at most; a row is as long for both but for noise. `in`, `out`: our speed to theirs, at
least. `cpu`: of one CPU, at most."""

PAUSE_S = 0.3
PLACE = "/tmp/vmtasks-benchmark"  # noqa: S108 - in the guest
ROW = 20


def took(work: Callable[[], object]) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ssh(target: Target, command: str, **streams: object) -> None:
    """One command by the OpenSSH client."""
    subprocess.run(target.argv(command), check=True, **{"stdin": subprocess.DEVNULL, **streams})  # type: ignore[call-overload]


def compare_true(target: Target, connection: client.Connection, rounds: int) -> tuple[float, float]:
    """How long `true` takes with us, to how long it takes with ssh: one by one, and many in a row.

    One by one, each begins after a pause, in which the guest does what the one before has left to do. In a row, that
    counts for the side that has left it.
    """
    ways: list[tuple[str, Callable[[], object]]] = [
        ("execute", lambda: connection.execute("true", timeout_s=60)),
        ("ssh", lambda: ssh(target, "true")),
    ]
    single: dict[str, list[float]] = {name: [] for name, _ in ways}
    row: dict[str, list[float]] = {name: [] for name, _ in ways}
    for count in range(rounds + 1):
        for name, work in ways if count % 2 else reversed(ways):  # each side begins as often as the other
            time.sleep(PAUSE_S)
            once = took(work)
            time.sleep(PAUSE_S)
            many = took(lambda work=work: [work() for _ in range(ROW)])  # type: ignore[misc]
            if count:  # the first ones of a connection do more
                single[name].append(once)
                row[name].append(many / ROW)
    for what, times in (("one by one", single), (f"{ROW} in a row, each", row)):
        print(f"true, {what}: " + ", ".join(f"{n} {statistics.median(t) * 1000:.1f} ms" for n, t in times.items()))
    one, many = (statistics.median(t["execute"]) / statistics.median(t["ssh"]) for t in (single, row))
    return one, many


def compare_files(target: Target, rounds: int, mib: int) -> tuple[float, float]:
    """Our speed to that of `ssh cat`, into the guest and out of it."""
    ways: dict[str, list[float]] = {name: [] for name in ("put", "cat in", "get", "cat out")}
    durable = (
        f"cat >{PLACE}.new && chmod 644 {PLACE}.new && dd if=/dev/null of={PLACE}.new conv=notrunc,fsync 2>/dev/null"
    )
    with tempfile.TemporaryDirectory() as folder:
        source, back = Path(folder) / "source", Path(folder) / "back"
        source.write_bytes(os.urandom(1 << 20) * mib)

        def cat_in() -> None:
            with source.open("rb") as data:
                ssh(target, f"{durable} && mv {PLACE}.new {PLACE}", stdin=data)

        def cat_out() -> None:
            with back.open("wb") as data:
                ssh(target, f"cat {PLACE}", stdout=data)
                os.fsync(data.fileno())

        for _ in range(rounds):
            for name, work in (
                ("put", lambda: files.put(target, source, PLACE)),
                ("cat in", cat_in),
                ("get", lambda: files.get(target, PLACE, back)),
                ("cat out", cat_out),
            ):
                ways[name].append(took(work))
                if name in {"get", "cat out"} and back.stat().st_size != source.stat().st_size:
                    raise AssertionError("the file did not come back whole")
        ssh(target, f"rm -f {PLACE} {PLACE}.new")
    middle = {name: statistics.median(times) for name, times in ways.items()}
    print(f"{mib} MiB: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in middle.items()))
    return middle["cat in"] / middle["put"], middle["cat out"] / middle["get"]


def waiting(connection: client.Connection, seconds: int) -> float:
    """The part of a CPU that this process uses while a command sleeps."""
    before = os.times()
    connection.execute(f"sleep {seconds}", timeout_s=seconds + 60)
    after = os.times()
    return (after.user + after.system - before.user - before.system) / (after.elapsed - before.elapsed)


def main() -> int:
    """Exit status 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of `true`; files go a fifth as often")
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("variables", nargs="*", help="as doit takes them: guest=tiny store=/path")
    args = parser.parse_args()
    try:
        target = Machine(load(Path.cwd(), dict(word.split("=", 1) for word in args.variables))).require_running()
    except VmTasksError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    ssh(target, "true")
    with client.connect(target, timeout_s=60) as connection:
        one, row = compare_true(target, connection, args.rounds)
        found = {"true": one, "row": row, "cpu": waiting(connection, 10)}
    found["in"], found["out"] = compare_files(target, max(1, args.rounds // 5), args.mib)
    print(json.dumps({"ratios": {name: round(value, 3) for name, value in found.items()}, "limits": LIMITS}))
    good = all(found[name] <= LIMITS[name] for name in ("true", "row", "cpu"))
    return 0 if good and all(found[name] >= LIMITS[name] for name in ("in", "out")) else 1


if __name__ == "__main__":
    sys.exit(main())
