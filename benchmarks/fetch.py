"""Compare fetch() with `curl | bunzip2 | sha256sum`: wall time and CPU, alternately, on one file over loopback.

    .venv/bin/python benchmarks/fetch.py [--small] [--folder DIR]

Both are whole processes, so the start of Python and its imports count. fetch() also keeps what it downloads, writes the
content and makes it durable; the pipe keeps nothing. Exit status 1 when the median of the wall ratios is above 1.1.
"""

import argparse
import bz2
import contextlib
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NAME = "half.iso.bz2"
LIMIT = 1.1
SERVER = """
import functools, http.server, sys
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""
FETCH = """
import pathlib, sys
from vmtasks.media.digest import Digest
from vmtasks.media.fetch import fetch
from vmtasks.media.want import Want
url, name, hex, folder = sys.argv[1:]
print(fetch(Want(urls=(url,), name=name, digests=(Digest("sha256", hex),)), pathlib.Path(folder)).sha256)
"""


def make(path: Path, packed_bytes: int) -> str:
    """Write data of which half is random and half is text, in bzip2; gives the SHA-256 of the data."""
    chance, digest, packer = random.Random(4), hashlib.sha256(), bz2.BZ2Compressor()  # noqa: S311 - repeatable
    words = [f"{chance.getrandbits(24):x}" for _ in range(4000)]
    with path.open("wb") as file:
        while file.tell() < packed_bytes:
            block = chance.randbytes(128 * 1024)
            text = " ".join(chance.choices(words, k=19_000)).encode()
            for piece in (block, text):
                digest.update(piece)
                file.write(packer.compress(piece))
        file.write(packer.flush())
    return digest.hexdigest()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve `folder` from a process of its own; gives the base URL."""
    with subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.terminate()


def measured(argv: list[str], expected: str) -> tuple[float, float]:
    """Run a process that must print `expected` first. Seconds of wall time, and of CPU with its children."""
    begun = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - begun
    assert process.returncode == 0, f"{argv[0]} exited with {process.returncode}"
    assert said.startswith(expected), f"{argv[0]} gave {said!r}"
    return wall, usage.ru_utime + usage.ru_stime


def compare(place: Path, packed_bytes: int, rounds: int) -> float:
    """Print one line per round; gives the median ratio of wall times."""
    (place / "www").mkdir()
    expected = make(place / "www" / NAME, packed_bytes)
    print(f"{NAME}: {(place / 'www' / NAME).stat().st_size / 1e6:.1f} MB")
    walls, cpus = [], []
    with serving(place / "www") as base:
        url = f"{base}/{NAME}"
        for count in range(rounds):
            pipe = measured(["sh", "-c", 'curl -sSf --noproxy "*" "$1" | bunzip2 | sha256sum', "sh", url], expected)
            ours = measured([sys.executable, "-c", FETCH, url, NAME, expected, str(place / f"store{count}")], expected)
            walls.append(ours[0] / pipe[0])
            cpus.append(ours[1] / pipe[1])
            print(
                f"round {count + 1}: pipe {pipe[0]:.2f} s wall {pipe[1]:.2f} s CPU;"
                f" fetch {ours[0]:.2f} s wall {ours[1]:.2f} s CPU; ratios {walls[-1]:.3f} wall {cpus[-1]:.3f} CPU"
            )
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    print(json.dumps({"wall_ratio": round(wall, 3), "cpu_ratio": round(cpu, 3), "rounds": rounds, "limit": LIMIT}))
    return wall


def main() -> int:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description="fetch() against curl | bunzip2 | sha256sum")
    parser.add_argument("--small", action="store_true", help="4 MB and one round: does it work at all?")
    parser.add_argument("--folder", type=Path, help="where the files are made and removed again (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        wall = compare(Path(place), 4_000_000 if args.small else 60_000_000, 1 if args.small else 3)
    return 0 if args.small or wall <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
