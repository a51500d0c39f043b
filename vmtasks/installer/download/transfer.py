"""One file from its URLs into a folder, by the one process that holds its lock: resume, retry, publish."""

import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from vmtasks.errors import FetchError
from vmtasks.host import files
from vmtasks.host.progress import seconds
from vmtasks.installer.download.digest import BLOCK, Digest, holds
from vmtasks.installer.download.meter import megabytes
from vmtasks.installer.download.mirror import Origin, asking, check_status, continues, local_path, new_client, origin_of
from vmtasks.installer.download.onepass import Pass, write_all
from vmtasks.installer.download.problem import Problem
from vmtasks.installer.download.want import Fetched, Limits, Want, shown, stem

if TYPE_CHECKING:
    import httpx

R = TypeVar("R")

GROWTH = 3
"""Content is at most about this many times its download: an installer ISO in bzip2 is 2.9 times."""
Progress = Callable[[int, int | None], None]
"""Is told the bytes of the download that are here, and of all of it where that is known."""


class Record(msgspec.Struct, frozen=True):
    """What `<sha256>.json` holds."""

    name: str
    url: str
    size: int
    digests: frozenset[Digest]


class Transfer:
    """One fetch by the process that holds its lock."""

    def __init__(self, want: Want, folder: Path, limits: Limits, progress: Progress | None, deadline: float) -> None:
        self._want = want
        self._folder = folder
        self._limits = limits
        self._progress = progress
        self._deadline = deadline
        self._part = folder / f"{stem(want)}.part"
        self._sidecar = folder / f"{stem(want)}.part.json"
        self._unpacked = folder / f"{stem(want)}.unpacked"
        self._pass: Pass | None = None
        self._origin: Origin | None = None
        self._pieced = False  # the bytes come from more than one answer, or from one whose end nobody announced

    def run(self) -> Fetched:
        """Try the URLs in order, but first the one that a part is there from. FetchError tells each one's fault."""
        origin = read_json(self._sidecar, Origin)
        refused = []
        for url in sorted(self._want.urls, key=lambda u: not (origin and origin.url == shown(u))):
            try:
                path = local_path(url)
                return self._copy(path, url) if path else self._download(url)
            except Problem as problem:
                refused.append((shown(url), problem))
            finally:
                self._drop_pass()
        raise FetchError(
            f"{self._want.name} could not be had: " + "; ".join(f"{url} {problem}" for url, problem in refused),
            hint=refused[-1][1].hint if refused else "name at least one URL",
        )

    # -- from a file

    def _copy(self, path: Path, url: str) -> Fetched:
        try:
            source = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a FIFO must not make us wait
        except OSError as error:
            raise Problem(f"cannot be read: {error.strerror}", "check the path and its permissions") from error
        with source:
            about = os.fstat(source.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise Problem("is not a regular file", "check the path")
            length = about.st_size
            self._origin = Origin(shown(url), "", length)
            self._pass = Pass(self._want, self._unpacked)
            self._check_space(length, length if self._want.packing else 0)
            while block := source.read(BLOCK):
                self._take(block)
        return self._publish(self._unpacked)

    # -- over the network

    def _download(self, url: str) -> Fetched:
        """Transfer, again while that can help, and publish."""
        tries, furthest, poisoned = 0, 0, False
        with new_client(self._limits) as client:
            while True:
                try:
                    self._transfer(client, url)
                    return self._publish(self._unpacked if self._want.packing else self._part)
                except Problem as problem:
                    here = self._pass.received if self._pass else 0
                    again = problem.again
                    if problem.poison:  # pieces that do not fit get one more chance, from the first byte
                        again, poisoned = self._pieced and not poisoned, True
                        self._discard()
                    tries, furthest = (1 if here > furthest else tries + 1), max(here, furthest)
                    if not again:
                        raise
                    if tries >= self._limits.attempts:
                        raise Problem(f"{problem} ({tries} attempts)", problem.hint) from problem
                    self._pause(tries, problem.wait_s)

    def _transfer(self, client: "httpx.Client", url: str) -> None:
        """One request, for what is missing. Problem if the file is not whole afterwards."""
        done = self._pick_up(url)
        if done and self._origin and done == self._origin.length:
            return
        headers = {"Range": f"bytes={done}-", "If-Range": self._origin.validator} if done and self._origin else {}
        left = max(0.1, self._deadline - time.monotonic())
        with asking(client, url, headers, self._limits, left) as response:
            self._accept(response, url, done)
            with self._part.open("ab", buffering=0) as part:
                for block in response.iter_raw():
                    write_all(part, block)
                    self._take(block)
        if self._origin and self._pass and self._origin.length not in {None, self._pass.received}:
            raise Problem(f"sent {self._pass.received} of {self._origin.length} bytes", again=True)

    def _pick_up(self, url: str) -> int:
        """How many bytes are here that this URL's answer may be appended to; a part on disk goes through the pass."""
        if self._pass is not None and self._origin is not None and self._origin.validator:
            self._pieced = True
            return self._pass.received
        self._drop_pass()
        origin, size = read_json(self._sidecar, Origin), self._part.stat().st_size if self._part.exists() else 0
        usable = origin and origin.url == shown(url) and origin.validator and 0 < size <= (origin.length or size)
        if not origin or not usable:
            self._discard()
            return 0
        self._origin, self._pieced = origin, True
        self._check_space(origin.length, size)
        self._pass = self._new_pass()
        with self._part.open("rb") as part:
            while block := part.read(BLOCK):
                self._take(block)
        return self._pass.received

    def _accept(self, response: "httpx.Response", url: str, done: int) -> None:
        """Make ready for the body of this answer, or say why it is not taken."""
        check_status(response, done)
        origin = origin_of(response, url)
        if response.status_code == 206:
            known = self._origin
            if not known or not continues(response, known, origin, done):
                raise Problem("changed while it was downloaded", again=True, poison=True)
            self._check_space(known.length, done)
            return
        self._discard()
        self._origin, self._pieced = origin, origin.length is None
        self._check_space(origin.length, 0)
        files.write(self._sidecar, msgspec.json.encode(origin))
        self._pass = self._new_pass()

    def _new_pass(self) -> Pass:
        return Pass(self._want, self._unpacked if self._want.packing else None)

    def _pause(self, tries: int, wait_s: float) -> None:
        """Back off; half of it is chance, so that machines that failed together do not come back together."""
        delay = min(self._limits.backoff_s * 2 ** (tries - 1), self._limits.backoff_max_s)
        delay *= random.uniform(0.5, 1)  # noqa: S311 - not a secret
        time.sleep(max(0, min(max(delay, wait_s), self._deadline - time.monotonic())))
        self._check_deadline()

    # -- both

    def _take(self, block: bytes) -> None:
        """Bytes that are already safe on disk, or will be."""
        if self._pass is None:
            raise AssertionError("no pass")
        self._pass.feed(block)
        if self._progress is not None:
            self._progress(self._pass.received, self._origin.length if self._origin else None)
        self._check_deadline()

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise FetchError(
                f"{self._want.name} was not here after {seconds(self._limits.total_s)}",
                hint="run it again: what has arrived is kept; or use a mirror that is nearer",
            )

    def _check_space(self, length: int | None, done: int) -> None:
        """Before the bytes come. What an unpacked content needs is known, or guessed from its download."""
        known = self._want.size or 0
        need = (length or 0) + (known or GROWTH * (length or 0)) if self._want.packing else length or known
        need -= done
        free = free_bytes(self._folder)
        if need > free:
            raise FetchError(
                f"{self._want.name} needs about {megabytes(need)} in {self._folder}, where {megabytes(free)} are free",
                hint="free some space, or put the store elsewhere with VMTASKS_STORE"
                + ("" if known else "; give the content's size in the configuration if this guess is too high"),
            )

    def _publish(self, path: Path) -> Fetched:
        """The file appears under its digest; then its record; then the part goes."""
        if self._pass is None or self._origin is None:
            raise AssertionError("nothing to publish")
        digests = self._pass.finish()
        sha256 = next(d.hex for d in digests if d.algorithm == "sha256" and d.of == "content")
        size, target = self._pass.size, self._folder / sha256
        if not holds(target, [Digest("sha256", sha256)]):  # else leave it: records elsewhere hold its time stamp
            with path.open("rb") as data:
                os.fchmod(data.fileno(), 0o444)
                os.fsync(data.fileno())
            path.rename(target)
        files.sync_folder(self._folder)
        record = Record(self._want.name, self._origin.url, size, digests)
        files.write(self._folder / f"{sha256}.json", msgspec.json.encode(record))
        self._discard()
        return Fetched(target, sha256, size, record.url, verified=bool(self._want.digests))

    def _drop_pass(self) -> None:
        """Let go of what is in memory and of the content written so far. The part stays."""
        if self._pass is not None:
            self._pass.close()
        self._pass = self._origin = None
        self._unpacked.unlink(missing_ok=True)

    def _discard(self) -> None:
        """Begin anew. The sidecar goes first, so that it never speaks of other bytes."""
        self._drop_pass()
        self._pieced = False
        self._sidecar.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)


def read_json(path: Path, kind: type[R]) -> R | None:
    """None when it is absent or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError):
        return None


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write there, also if the folder could not even be made."""
    return shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free
