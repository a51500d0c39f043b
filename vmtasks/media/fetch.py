"""URLs and digests -> one verified file that is named by its SHA-256: owns httpx.

    <sha256>                the content, decompressed, 0444; published by rename after fsync
    <sha256>.json           where it came from and each digest computed on the way; written after it
    <name>.<key>.part       what was downloaded so far, still compressed
    <name>.<key>.part.json  URL, validator and length that those bytes belong to; without it the part is not believed
    <name>.<key>.unpacked   content being written
    <name>.<key>.lock       held by the one process that fetches this

Hashes, decompression and writing happen in one pass over the bytes. The state of a hash or of a decompressor cannot be
saved, so a later run that resumes feeds the part from disk through the same pass; a resume in the same run goes on.
"""

import bz2
import contextlib
import errno
import functools
import hashlib
import lzma
import os
import queue
import random
import re
import shutil
import stat
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TypeVar
from urllib.parse import unquote

import msgspec

from vmtasks import atomic
from vmtasks.errors import FetchError, StateError
from vmtasks.progress import Say, seconds

if TYPE_CHECKING:
    import httpx

R = TypeVar("R")

BLOCK = 256 * 1024
"""Bytes read from a file, or given out by a decompressor, at once."""
QUEUED = 32
"""Blocks between the network and the decompressor: half a second of work for bzip2."""
HEAD = 512
"""Bytes at the start that are looked at for HTML."""
GROWTH = 3
"""Content is at most about this many times its download: an installer ISO in bzip2 is 2.9 times."""
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html)", re.IGNORECASE)
RETRIED = {408, 425, 429, 500, 502, 503, 504}
HEX_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}
NETWORK_HINT = (
    "check the network and HTTP_PROXY, HTTPS_PROXY, NO_PROXY; then run it again, what has arrived is kept;"
    " a file:// URL or a path to a file that you have is accepted too"
)

Algorithm = Literal["md5", "sha1", "sha256", "sha512"]
Of = Literal["download", "content"]
Progress = Callable[[int, int | None], None]
"""Is told the bytes of the download that are here, and of all of it where that is known."""


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A promise about the file as downloaded (compressed, if it is), or about its content."""

    algorithm: Algorithm
    hex: str
    of: Of = "content"

    def __post_init__(self) -> None:
        """ValueError for a digest that cannot be one; msgspec turns that into its ValidationError."""
        if not re.fullmatch(rf"[0-9a-fA-F]{{{HEX_DIGITS.get(self.algorithm, 0)}}}", self.hex):
            raise ValueError(f"{self.hex!r} is not the hexadecimal form of an {self.algorithm} digest")
        msgspec.structs.force_setattr(self, "hex", self.hex.lower())


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """One file: where it is to be had, best first, and what is known of it. `size`: bytes of its content."""

    urls: tuple[str, ...]
    name: str
    digests: tuple[Digest, ...] = ()
    compression: Literal["auto", "", "bz2", "gz", "xz"] = "auto"
    size: int | None = None

    @property
    def packing(self) -> str:
        """`compression`, or what the end of the name says."""
        suffix = self.name.rpartition(".")[2]
        return (suffix if suffix in STREAMS else "") if self.compression == "auto" else self.compression

    @property
    def promises(self) -> frozenset[Digest]:
        """The digests; what is not compressed has only a content."""
        if self.packing:
            return frozenset(self.digests)
        return frozenset(Digest(digest.algorithm, digest.hex) for digest in self.digests)


class Limits(msgspec.Struct, frozen=True):
    """How long to go on, in seconds; `attempts` count per URL, anew whenever more has arrived than ever before."""

    connect_s: float = 20
    stall_s: float = 30
    total_s: float = 4 * 3600
    attempts: int = 5
    backoff_s: float = 1
    backoff_max_s: float = 30


class Fetched(msgspec.Struct, frozen=True):
    """The file; its size in bytes; `verified` is False when nothing was known to hold it against."""

    path: Path
    sha256: str
    size: int
    url: str
    verified: bool


class _Record(msgspec.Struct, frozen=True):
    """What `<sha256>.json` holds."""

    name: str
    url: str
    size: int
    digests: frozenset[Digest]


class _Origin(msgspec.Struct, frozen=True):
    """What `<name>.<key>.part.json` holds."""

    url: str
    validator: str
    length: int | None


class _Problem(Exception):  # noqa: N818 - not an error until all mirrors have been tried
    """This URL did not give the file: `again` if it still may, `poison` if what has arrived must not be kept."""

    def __init__(
        self, reason: str, hint: str = NETWORK_HINT, *, again: bool = False, poison: bool = False, wait_s: float = 0
    ) -> None:
        super().__init__(reason)
        self.hint = hint
        self.again = again
        self.poison = poison
        self.wait_s = wait_s


def fetch(
    want: Want,
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
        with _locked(folder / f"{_stem(want)}.lock", want.name, deadline, waiting):
            return _reuse(want, folder) or _Fetch(want, folder, limits, progress, deadline).run()
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = f"the disk is full ({megabytes(_free(folder))} free)" if full else str(error)
        hint = "free some space" if full else "check the folder's permissions and its disk"
        raise FetchError(
            f"{want.name} could not be stored in {folder}: {reason}",
            hint=f"{hint}, then run it again: what has arrived is kept",
        ) from error


def parse_bsd_sums(text: str, algorithm: str = "md5") -> dict[str, str]:
    """`MD5 (file) = hex` lines -> {file: hex}; other lines are skipped. FetchError if a file has two digests."""
    sums: dict[str, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(rf"{algorithm} \((.+)\) = ([0-9a-f]{{{HEX_DIGITS[algorithm]}}})\s*", line, re.IGNORECASE)
        if match and sums.setdefault(match[1], match[2].lower()) != match[2].lower():
            raise FetchError(f"the list of sums has two different digests for {match[1]}", hint="use another mirror")
    return sums


def megabytes(count: float) -> str:
    """1_500_000 -> '1.5 MB'."""
    return f"{count / 1e6:.1f} MB"


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
            self._seen.clear()  # begun anew: an old rate would be negative
        if self._seen and now - self._seen[-1][0] < self._every_s and done != total:
            return
        self._seen.append((now, done))
        then, before = self._seen[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        line = f"{done / 1e6:.1f} of {megabytes(total)} ({100 * done // total} %)" if total else megabytes(done)
        line += f", {megabytes(rate)}/s" if rate else ""
        self._say(line + (f", {seconds((total - done) / rate)} left" if rate and total and done < total else ""))


class _Stream(Protocol):
    """What bz2 and lzma decompressors have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """A gzip member, as a _Stream."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = not self._zlib.unconsumed_tail and len(plain) < max_length
        return plain


STREAMS: dict[str, Callable[[], _Stream]] = {
    "bz2": bz2.BZ2Decompressor,
    "gz": _Gzip,
    "xz": functools.partial(lzma.LZMADecompressor, format=lzma.FORMAT_XZ, memlimit=1 << 30),
}


class _Unpacker:
    """Compressed blocks in, plain blocks of bounded size out, over all streams of the file (pbzip2 makes many)."""

    def __init__(self, packing: str) -> None:
        self._packing = packing
        self._stream: _Stream | None = None
        self._ended = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """_Problem for what is not, or not only, data of this compression."""
        if not self._packing:
            yield data
            return
        while True:
            if self._stream is None:
                if self._ended and self._packing != "bz2":  # xz and gzip may be padded between streams
                    data = data.lstrip(b"\0")
                if not data:
                    return
                self._stream = STREAMS[self._packing]()
            try:
                plain = self._stream.decompress(data, BLOCK)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                what = "has other bytes after the end of its" if self._ended else "is not, or is damaged,"
                raise _bad(f"{what} {self._packing} data") from error
            yield plain
            data = b""
            if self._stream.eof:
                data, self._stream, self._ended = self._stream.unused_data, None, self._ended + 1
            elif self._stream.needs_input:
                return

    def finish(self) -> None:
        """_Problem when the data stop in the middle."""
        if self._packing and (self._stream is not None or not self._ended):
            raise _bad(f"ends in the middle of its {self._packing} data")


class _Pass:
    """The one pass over the bytes of one file from its first. A thread decompresses, hashes and writes the content."""

    def __init__(self, want: Want, output: Path | None) -> None:
        """`output` is None when the content is what the caller writes anyway."""
        self.received = 0
        self.size = 0
        self._head: bytes | None = b""
        self._promises = want.promises
        self._hashes: dict[tuple[Of, Algorithm], hashlib._Hash] = {("content", "sha256"): hashlib.sha256()}
        for digest in self._promises:
            self._hashes[digest.of, digest.algorithm] = hashlib.new(digest.algorithm, usedforsecurity=False)
        self._unpacker = _Unpacker(want.packing)
        self._output: BinaryIO | None = output.open("wb", buffering=0) if output else None
        self._blocks: queue.Queue[bytes | None] = queue.Queue(maxsize=QUEUED)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="unpack", daemon=True)
        self._thread.start()

    def feed(self, block: bytes) -> None:
        """Take the next bytes. Raises what went wrong with them or with those before."""
        if self._error is not None:
            raise self._error
        self._update("download", block)
        self.received += len(block)
        if self._head is not None:  # held back, or else the decompressor would complain about HTML first
            self._head += block
            if HTML.match(self._head):
                raise _html()
            if len(self._head) < HEAD:
                return
            block, self._head = self._head, None
        self._blocks.put(block)

    def finish(self) -> frozenset[Digest]:
        """Wait until all is written; the digests. _Problem if they are not those that were promised."""
        if self._head:
            self._blocks.put(self._head)
        self.close()
        if self._error is not None:
            raise self._error
        if not self.received:
            raise _bad("is empty")
        self._unpacker.finish()
        got = {(of, name): Digest(name, sum_.hexdigest(), of) for (of, name), sum_ in self._hashes.items()}
        for promise in sorted(self._promises, key=str):
            found = got[promise.of, promise.algorithm]
            if found != promise:
                raise _bad(f"has the {found.algorithm} {found.hex} ({found.of}), not {promise.hex}")
        return frozenset(got.values())

    def close(self) -> None:
        """Let the thread end, and close the output. May be called twice."""
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()
        if self._output is not None:
            self._output.close()

    def _update(self, of: Of, block: bytes) -> None:
        for (what, _), sum_ in self._hashes.items():
            if what == of:
                sum_.update(block)

    def _work(self) -> None:
        """After an error go on taking blocks, so that nobody waits for room in the queue."""
        while (block := self._blocks.get()) is not None:
            if self._error is None:
                try:
                    for plain in self._unpacker.feed(block):
                        self._update("content", plain)
                        self.size += len(plain)
                        if self._output is not None:
                            _write_all(self._output, plain)
                except Exception as error:  # noqa: BLE001 - raised again by feed() or finish()
                    self._error = error


class _Fetch:
    """One fetch by the process that holds its lock."""

    def __init__(self, want: Want, folder: Path, limits: Limits, progress: Progress | None, deadline: float) -> None:
        self._want = want
        self._folder = folder
        self._limits = limits
        self._progress = progress
        self._deadline = deadline
        self._part = folder / f"{_stem(want)}.part"
        self._sidecar = folder / f"{_stem(want)}.part.json"
        self._unpacked = folder / f"{_stem(want)}.unpacked"
        self._pass: _Pass | None = None
        self._origin: _Origin | None = None
        self._pieced = False  # the bytes come from more than one answer, or from one whose end nobody announced

    def run(self) -> Fetched:
        """Try the URLs in order, but first the one that a part is there from. FetchError tells each one's fault."""
        origin = _read_json(self._sidecar, _Origin)
        refused = []
        for url in sorted(self._want.urls, key=lambda u: not (origin and origin.url == shown(u))):
            try:
                path = _local_path(url)
                return self._copy(path, url) if path else self._download(url)
            except _Problem as problem:
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
            raise _Problem(f"cannot be read: {error.strerror}", "check the path and its permissions") from error
        with source:
            about = os.fstat(source.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise _Problem("is not a regular file", "check the path")
            length = about.st_size
            self._origin = _Origin(shown(url), "", length)
            self._pass = _Pass(self._want, self._unpacked)
            self._check_space(length, length if self._want.packing else 0)
            while block := source.read(BLOCK):
                self._take(block)
        return self._publish(self._unpacked)

    # -- over the network

    def _download(self, url: str) -> Fetched:
        """Transfer, again while that can help, and publish."""
        tries, furthest, poisoned = 0, 0, False
        with _client(self._limits) as client:
            while True:
                try:
                    self._transfer(client, url)
                    return self._publish(self._unpacked if self._want.packing else self._part)
                except _Problem as problem:
                    here = self._pass.received if self._pass else 0
                    again = problem.again
                    if problem.poison:  # pieces that do not fit get one more chance, from the first byte
                        again, poisoned = self._pieced and not poisoned, True
                        self._discard()
                    tries, furthest = (1 if here > furthest else tries + 1), max(here, furthest)
                    if not again:
                        raise
                    if tries >= self._limits.attempts:
                        raise _Problem(f"{problem} ({tries} attempts)", problem.hint) from problem
                    self._pause(tries, problem.wait_s)

    def _transfer(self, client: "httpx.Client", url: str) -> None:
        """One request, for what is missing. _Problem if the file is not whole afterwards."""
        import httpx  # noqa: PLC0415

        done = self._pick_up(url)
        if done and self._origin and done == self._origin.length:
            return
        headers = {"Range": f"bytes={done}-", "If-Range": self._origin.validator} if done and self._origin else {}
        left = max(0.1, self._deadline - time.monotonic())
        timeout = httpx.Timeout(min(self._limits.stall_s, left), connect=min(self._limits.connect_s, left))
        try:
            with client.stream("GET", url, headers=headers, timeout=timeout) as response:
                self._accept(response, url, done)
                with self._part.open("ab", buffering=0) as part:
                    for block in response.iter_raw():
                        _write_all(part, block)
                        self._take(block)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _transport_problem(error, self._limits) from error
        if self._origin and self._pass and self._origin.length not in {None, self._pass.received}:
            raise _Problem(f"sent {self._pass.received} of {self._origin.length} bytes", again=True)

    def _pick_up(self, url: str) -> int:
        """How many bytes are here that this URL's answer may be appended to; a part on disk goes through the pass."""
        if self._pass is not None and self._origin is not None and self._origin.validator:
            self._pieced = True
            return self._pass.received
        self._drop_pass()
        origin, size = _read_json(self._sidecar, _Origin), self._part.stat().st_size if self._part.exists() else 0
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
        _check_status(response, done)
        origin = _origin_of(response, url)
        if response.status_code == 206:
            known = self._origin
            if not known or not _continues(response, known, origin, done):
                raise _Problem("changed while it was downloaded", again=True, poison=True)
            self._check_space(known.length, done)
            return
        self._discard()
        self._origin, self._pieced = origin, origin.length is None
        self._check_space(origin.length, 0)
        atomic.write(self._sidecar, msgspec.json.encode(origin))
        self._pass = self._new_pass()

    def _new_pass(self) -> _Pass:
        return _Pass(self._want, self._unpacked if self._want.packing else None)

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
        free = _free(self._folder)
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
        if not _holds(target, [Digest("sha256", sha256)]):  # else leave it: records elsewhere hold its time stamp
            with path.open("rb") as data:
                os.fchmod(data.fileno(), 0o444)
                os.fsync(data.fileno())
            path.rename(target)
        atomic.sync_folder(self._folder)
        record = _Record(self._want.name, self._origin.url, size, digests)
        atomic.write(self._folder / f"{sha256}.json", msgspec.json.encode(record))
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


def shown(url: str) -> str:
    """A URL as it may be printed and stored: without a password."""
    return re.sub(r"//[^/@]*@", "//", url)


def _bad(reason: str) -> _Problem:
    hint = "the file there is damaged or was replaced, or the digest in the configuration is another file's: compare it"
    return _Problem(f"{reason}", f"{hint} with what the project publishes, or use another mirror", poison=True)


def _html() -> _Problem:
    hint = "look at the URL in a browser: a login page of the network, a mirror that moved, or a missing file"
    return _Problem("sent an HTML page, not the file", hint, poison=True)


def _check_status(response: "httpx.Response", done: int) -> None:
    """_Problem unless a body of the file follows."""
    status, said = response.status_code, f"answered {response.status_code} {response.reason_phrase}".rstrip()
    if status == 416 and done:
        raise _Problem(said, again=True, poison=True)
    if status in RETRIED:
        wait = response.headers.get("Retry-After", "")
        raise _Problem(said, again=True, wait_s=min(float(wait), 60) if re.fullmatch(r"[0-9]{1,6}", wait) else 0)
    if status != 200 and not (status == 206 and done):
        raise _Problem(said, "check the version and the URL, or use another mirror")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        problem = _html()
        problem.poison = False  # a login page says nothing about what was downloaded before
        raise problem


def _origin_of(response: "httpx.Response", url: str) -> _Origin:
    """What identifies this body. A weak ETag does not promise equal bytes; a date is better than nothing."""
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    length = response.headers.get("Content-Length", "")
    return _Origin(shown(url), etag if etag.startswith('"') else date, int(length) if length.isdecimal() else None)


def _continues(response: "httpx.Response", known: _Origin, now: _Origin, done: int) -> bool:
    """Whether a 206 is the rest of the same file; some servers send one although If-Range does not hold."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not match or int(match[1]) != done:
        return False
    same_length = match[2] == "*" or known.length in {None, int(match[2])}
    return same_length and now.validator in {"", known.validator}


def _client(limits: Limits) -> "httpx.Client":
    """FetchError when the proxy variables are unusable."""
    import httpx  # noqa: PLC0415

    # identity: a digest is about the bytes of the file, not about how a server chose to send them
    headers = {"Accept-Encoding": "identity", "User-Agent": "vmtasks"}
    try:
        return httpx.Client(
            follow_redirects=True, max_redirects=10, headers=headers, timeout=limits.stall_s, trust_env=True
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise FetchError(
            f"the proxy or certificate settings of the environment cannot be used: {error}",
            hint="check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE",
        ) from error


def _transport_problem(error: Exception, limits: Limits) -> _Problem:
    import httpx  # noqa: PLC0415

    if isinstance(error, httpx.ReadTimeout):
        return _Problem(f"sent nothing for {seconds(limits.stall_s)}", again=True)
    if isinstance(error, httpx.TooManyRedirects):
        return _Problem("redirects in a circle, or more than 10 times", "use another mirror")
    said = f"failed: {error or type(error).__name__}"
    final = isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol) or "CERTIFICATE_VERIFY" in said
    return _Problem(said, "check the URL" if final else NETWORK_HINT, again=not final)


@contextlib.contextmanager
def _locked(path: Path, name: str, deadline: float, waiting: Say | None) -> Iterator[None]:
    from filelock import FileLock, Timeout  # noqa: PLC0415

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting(f"{name} is being fetched by another process; waiting for it")
        try:
            lock.acquire(timeout=max(0.0, deadline - time.monotonic()), poll_interval=0.1)
        except Timeout:
            raise StateError(
                f"another process is fetching {name} and did not end in time",
                hint=f"wait for it, or end that process; the lock is {path}",
            ) from None
    try:
        yield
    finally:
        lock.release()


def _reuse(want: Want, folder: Path) -> Fetched | None:
    """What is already here, read again to be sure. The record knows digests of downloads that are gone."""
    strong = [d.hex for d in want.promises if d.algorithm == "sha256" and d.of == "content"]
    names = strong or [path.stem for path in sorted(folder.glob("*.json")) if re.fullmatch(r"[0-9a-f]{64}", path.stem)]
    for sha256 in names if want.promises else ():
        record = _read_json(folder / f"{sha256}.json", _Record)
        if not strong and (record is None or not want.promises <= record.digests):
            continue
        content = {d for d in want.promises if d.of == "content"} | {Digest("sha256", sha256)}
        if _holds(folder / sha256, content):
            size = (folder / sha256).stat().st_size
            return Fetched(folder / sha256, sha256, size, record.url if record else "", verified=True)
    return None


def _holds(path: Path, digests: Iterable[Digest]) -> bool:
    """Whether the file is there and has all these digests of content."""
    sums = {d: hashlib.new(d.algorithm, usedforsecurity=False) for d in digests}
    try:
        with path.open("rb") as data:
            while block := data.read(BLOCK):
                for sum_ in sums.values():
                    sum_.update(block)
    except FileNotFoundError:
        return False
    return all(sum_.hexdigest() == digest.hex for digest, sum_ in sums.items())


def _stem(want: Want) -> str:
    """One name for all fetches of one file, whichever mirror they use."""
    if not re.fullmatch(r"[^/\0\s.][^/\0]{0,150}", want.name):
        raise FetchError(f"{want.name!r} is not the name of a file", hint="check the configuration")
    what = sorted(map(str, want.promises)) or [*map(shown, want.urls)]
    return f"{want.name}.{hashlib.sha256(msgspec.json.encode([what, want.packing])).hexdigest()[:12]}"


def _local_path(url: str) -> Path | None:
    """The file that a file:// URL or a plain path names; None for what is on the network."""
    local = re.fullmatch(r"file:(?://([^/]*))?(/.*)", url, re.IGNORECASE)
    if local is None:
        return None if "://" in url else Path(url).expanduser()
    if local[1] not in {None, "", "localhost"}:
        raise _Problem("names a file on another machine", "write file:/// and an absolute path")
    return Path(unquote(local[2]))


def _read_json(path: Path, kind: type[R]) -> R | None:
    """None when it is absent or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError):
        return None


def _write_all(file: BinaryIO, data: bytes) -> None:
    """An unbuffered write may take only some of the bytes."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _free(folder: Path) -> int:
    """Bytes that this user may still write there, also if the folder could not even be made."""
    return shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free
