"""One file from its URLs into a folder, by the one process that holds its lock: resume, retry, publish. Owns httpx."""

import contextlib
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import httpx
import msgspec

from vmtasks.errors import FetchError
from vmtasks.host import files
from vmtasks.host.progress import seconds
from vmtasks.installer.download.content import BLOCK, NETWORK_HINT, Pass, Problem, holds, html_page, write_all
from vmtasks.installer.download.want import Digest, Fetched, Limits, Record, WantedFile, shown
from vmtasks.store.records import read_json

RETRIED = {408, 425, 429, 500, 502, 503, 504}
GROWTH = 3
"""Content is at most about this many times its download: an installer ISO in bzip2 is 2.9 times."""
Progress = Callable[[int, int | None], None]
"""Is told the bytes of the download that are here, and of all of it where that is known."""


class Origin(msgspec.Struct, frozen=True):
    """What `<name>.<key>.part.json` holds."""

    url: str
    validator: str
    length: int | None


class Transfer:
    """One fetch by the process that holds its lock."""

    def __init__(
        self, want: WantedFile, folder: Path, limits: Limits, progress: Progress | None, deadline: float
    ) -> None:
        self._want = want
        self._folder = folder
        self._limits = limits
        self._progress = progress
        self._deadline = deadline
        self._part = folder / f"{want.stem}.part"
        self._sidecar = folder / f"{want.stem}.part.json"
        self._unpacked = folder / f"{want.stem}.unpacked"
        self._pass: Pass | None = None
        self._origin: Origin | None = None
        self._pieced = False  # the bytes come from more than one answer, or from one without a Content-Length

    def run(self) -> Fetched:
        """Try the URLs in order, beginning with the one that a part came from. FetchError names each URL's fault."""
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
            f"{self._want.name} could not be fetched: " + "; ".join(f"{url} {problem}" for url, problem in refused),
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

    def _transfer(self, client: httpx.Client, url: str) -> None:
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
        """Count the bytes that this URL's answer may be appended to. A part on disk goes through the pass first."""
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

    def _accept(self, response: httpx.Response, url: str, done: int) -> None:
        """Prepare for the body of this answer. Problem when it is not accepted."""
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
        """Hash and unpack bytes that are on disk already, or will be."""
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
        """Raise FetchError when the file will not fit. The content's size is known or guessed."""
        known = self._want.size or 0
        need = (length or 0) + (known or GROWTH * (length or 0)) if self._want.packing else length or known
        need -= done
        free = files.free_bytes(self._folder)
        if need > free:
            raise FetchError(
                f"{self._want.name} needs about {megabytes(need)} in {self._folder}, where {megabytes(free)} are free",
                hint="free some space, or put the store elsewhere with VMTASKS_STORE"
                + ("" if known else "; give the content's size in the configuration if this guess is too high"),
            )

    def _publish(self, path: Path) -> Fetched:
        """Rename the file to its digest, then write its record, then remove the part."""
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
        """Drop what is in memory and the content written so far. The part stays."""
        if self._pass is not None:
            self._pass.close()
        self._pass = self._origin = None
        self._unpacked.unlink(missing_ok=True)

    def _discard(self) -> None:
        """Remove all that has arrived. The sidecar goes first, so that it never describes other bytes."""
        self._drop_pass()
        self._pieced = False
        self._sidecar.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)


# -- what a URL names, and what its server answers


@contextlib.contextmanager
def asking(
    client: httpx.Client, url: str, headers: dict[str, str], limits: Limits, left_s: float
) -> Iterator[httpx.Response]:
    """Send one GET and yield the answer, its body unread. Problem when the transport fails, also while reading."""
    timeout = httpx.Timeout(min(limits.stall_s, left_s), connect=min(limits.connect_s, left_s))
    try:
        with client.stream("GET", url, headers=headers, timeout=timeout) as response:
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _transport_problem(error, limits) from error


def check_status(response: httpx.Response, done: int) -> None:
    """Raise Problem unless a body of the file follows."""
    status, said = response.status_code, f"answered {response.status_code} {response.reason_phrase}".rstrip()
    if status == 416 and done:
        raise Problem(said, again=True, poison=True)
    if status in RETRIED:
        wait = response.headers.get("Retry-After", "")
        raise Problem(said, again=True, wait_s=min(float(wait), 60) if re.fullmatch(r"[0-9]{1,6}", wait) else 0)
    if status != 200 and not (status == 206 and done):
        raise Problem(said, "check the version and the URL, or use another mirror")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        problem = html_page()
        problem.poison = False  # a login page says nothing about what was downloaded before
        raise problem


def origin_of(response: httpx.Response, url: str) -> Origin:
    """What identifies this body. A weak ETag does not promise equal bytes; a date is better than nothing."""
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    length = response.headers.get("Content-Length", "")
    return Origin(shown(url), etag if etag.startswith('"') else date, int(length) if length.isdecimal() else None)


def continues(response: httpx.Response, known: Origin, now: Origin, done: int) -> bool:
    """Whether a 206 is the rest of the same file; some servers send one although If-Range does not hold."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not match or int(match[1]) != done:
        return False
    same_length = match[2] == "*" or known.length in {None, int(match[2])}
    return same_length and now.validator in {"", known.validator}


def new_client(limits: Limits) -> httpx.Client:
    """A client with the proxies of the environment. FetchError when those are unusable."""
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


def _transport_problem(error: Exception, limits: Limits) -> Problem:
    if isinstance(error, httpx.ReadTimeout):
        return Problem(f"sent nothing for {seconds(limits.stall_s)}", again=True)
    if isinstance(error, httpx.TooManyRedirects):
        return Problem("redirects in a circle, or more than 10 times", "use another mirror")
    said = f"failed: {error or type(error).__name__}"
    final = isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol) or "CERTIFICATE_VERIFY" in said
    return Problem(said, "check the URL" if final else NETWORK_HINT, again=not final)


def local_path(url: str) -> Path | None:
    """The file that a file:// URL or a plain path names; None for what is on the network."""
    local = re.fullmatch(r"file:(?://([^/]*))?(/.*)", url, re.IGNORECASE)
    if local is None:
        return None if "://" in url else Path(url).expanduser()
    if local[1] not in {None, "", "localhost"}:
        raise Problem("names a file on another machine", "write file:/// and an absolute path")
    return Path(unquote(local[2]))


def megabytes(count: float) -> str:
    """1_500_000 -> '1.5 MB'."""
    return f"{count / 1e6:.1f} MB"
