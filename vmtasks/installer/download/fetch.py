"""URLs and digests -> one verified file that is named by its SHA-256, from the folder if it is there.

<sha256>                the content, decompressed, 0444; published by rename after fsync
<sha256>.json           where it came from and each digest computed on the way; written after it
<name>.<key>.part       what was downloaded so far, still compressed
<name>.<key>.part.json  URL, validator and length that those bytes belong to; without it the part is discarded
<name>.<key>.unpacked   content being written
<name>.<key>.lock       held by the one process that fetches this
"""

import errno
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vmtasks.errors import FetchError
from vmtasks.host import files
from vmtasks.host.locks import lock
from vmtasks.host.progress import Say, is_terminal, seconds
from vmtasks.installer.download.content import holds
from vmtasks.installer.download.transfer import Progress, Transfer, megabytes
from vmtasks.installer.download.want import HEX_DIGITS, Digest, Fetched, Limits, Record, Release, WantedFile, parse_sums
from vmtasks.store.records import read_json

SUMS_LIMITS = Limits(total_s=120, attempts=2)
SUMS_BYTES = 1_000_000
"""A list of sums that is longer is none."""


def obtain(wanted: Release, folder: Path, note: Say, *, allow_unverified: bool = False) -> tuple[Fetched, str]:
    """Fetch a release; the file, in `folder`, and where its digest comes from, or ''. FetchError, StateError."""
    digests, against = wanted.digests, "guest.toml" if wanted.digests else ""
    if not digests:
        try:
            digest, against = _published(wanted)
            digests = (digest,)
            note(f"guest.toml has no digest for {wanted.described}; its {digest.algorithm} is taken from {against}")
        except FetchError as error:
            if not allow_unverified:
                raise
            note(f"not verified: {error.message}")
    got = fetch(
        WantedFile(urls=wanted.urls(wanted.name), name=wanted.name, digests=digests, size=wanted.size),
        folder,
        progress=Meter(note, every_s=1 if is_terminal() else 10),
        waiting=note,
        allow_unverified=allow_unverified,
    )
    return got, against


def sums(wanted: Release) -> tuple[str, str]:
    """The text of the list of sums beside the file, and its address. FetchError when there is none."""
    if not wanted.sums:
        raise FetchError(f"guest.toml names no list of sums for {wanted.name}", hint="installer.sums in guest.toml")
    with tempfile.TemporaryDirectory() as place:
        want = WantedFile(urls=wanted.urls(wanted.sums), name=wanted.sums, compression="")
        got = fetch(want, Path(place), progress=_limit_sums, limits=SUMS_LIMITS, allow_unverified=True)
        return got.path.read_text(errors="replace"), got.url


def _limit_sums(done: int, _: int | None) -> None:
    if done > SUMS_BYTES:
        raise FetchError(f"the list of sums has more than {megabytes(SUMS_BYTES)}", hint="use another mirror")


def _published(wanted: Release) -> tuple[Digest, str]:
    """The strongest digest that the mirrors' list of sums has for the file, and the list's address."""
    missing = f"no digest is known for {wanted.name}: guest.toml has none for {wanted.described}"
    known = f" (digests are known for {', '.join(wanted.known)})" if wanted.known else ""
    check = f"check the version{known}; " if wanted.version else ""
    hint = f"{check}add a digest to installer.digests in guest.toml; or `doit fetch --allow-unverified`"
    if not wanted.sums:
        raise FetchError(missing, hint=hint)
    try:
        text, url = sums(wanted)
    except FetchError as error:
        raise FetchError(f"{missing}, and {error.message}", hint=hint) from error
    for algorithm in sorted(HEX_DIGITS, key=lambda name: -HEX_DIGITS[name]):
        listed = parse_sums(text, algorithm)
        if wanted.name in listed:
            return Digest.parse(f"{algorithm}:{listed[wanted.name]} of download"), url
    raise FetchError(f"{missing}, and {url} does not list it", hint=hint)


def fetch(
    want: WantedFile,
    folder: Path,
    *,
    progress: Progress | None = None,
    waiting: Say | None = None,
    limits: Limits | None = None,
    allow_unverified: bool = False,
) -> Fetched:
    """Leave the content of `want` as `folder/<sha256>`, from there if it is there, else from the first URL that has it.

    `waiting` is told when another process fetches the same. FetchError says what was tried, what came back and what to
    do; StateError when the other process was not done in time. In both cases nothing is published.
    """
    if not want.digests and not allow_unverified:
        raise FetchError(
            f"no digest is known for {want.name}, so what a mirror sends could not be checked",
            hint="add its digest to the configuration, or pass --allow-unverified",
        )
    limits = limits or Limits()
    deadline = time.monotonic() + limits.total_s
    try:
        if (found := _reuse(want, folder)) is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        left = max(0.0, deadline - time.monotonic())
        told = None if waiting is None else lambda holder: waiting(f"{want.name}: {holder} is fetching it; waiting")
        with lock(folder / f"{want.stem}.lock", want.name, timeout_s=left, waiting=told):
            return _reuse(want, folder) or Transfer(want, folder, limits, progress, deadline).run()
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = f"the disk is full ({megabytes(files.free_bytes(folder))} free)" if full else str(error)
        hint = "free some space" if full else "check the folder's permissions and its disk"
        raise FetchError(
            f"{want.name} could not be stored in {folder}: {reason}",
            hint=f"{hint}, then run it again: what has arrived is kept",
        ) from error


def _reuse(want: WantedFile, folder: Path) -> Fetched | None:
    """What is already here, read again to be sure. The record knows digests of downloads that are gone."""
    strong = [d.hex for d in want.promises if d.algorithm == "sha256" and d.of == "content"]
    names = strong or [path.stem for path in sorted(folder.glob("*.json")) if re.fullmatch(r"[0-9a-f]{64}", path.stem)]
    for sha256 in names if want.promises else ():
        record = read_json(folder / f"{sha256}.json", Record)
        if not strong and (record is None or not want.promises <= record.digests):
            continue
        content = {d for d in want.promises if d.of == "content"} | {Digest("sha256", sha256)}
        if holds(folder / sha256, content):
            size = (folder / sha256).stat().st_size
            return Fetched(folder / sha256, sha256, size, record.url if record else "", verified=True)
    return None


class Meter:
    """A Progress that says a line with rate and time left, at most one each `every_s` seconds and one at the end."""

    def __init__(self, say: Say, *, every_s: float = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """`say` gets `120.0 of 260.0 MB (46 %), 5.1 MB/s, 27 s left`; the rate is that of the last ten lines."""
        self._say = say
        self._every_s = every_s
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=11)

    def __call__(self, done: int, total: int | None) -> None:
        """Take note of `done` bytes out of `total`."""
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # the download began again: the rate would be negative
        if self._seen and now - self._seen[-1][0] < self._every_s and done != total:
            return
        self._seen.append((now, done))
        then, before = self._seen[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        line = f"{done / 1e6:.1f} of {megabytes(total)} ({100 * done // total} %)" if total else megabytes(done)
        line += f", {megabytes(rate)}/s" if rate else ""
        self._say(line + (f", {seconds((total - done) / rate)} left" if rate and total and done < total else ""))
