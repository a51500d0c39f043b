"""What a URL names, what its server answers, and what that means for the download: owns httpx."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from vmtasks.errors import FetchError
from vmtasks.host.progress import seconds
from vmtasks.installer.download.problem import NETWORK_HINT, Problem, html_page
from vmtasks.installer.download.want import Limits, shown

if TYPE_CHECKING:
    import httpx

RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Origin(msgspec.Struct, frozen=True):
    """What `<name>.<key>.part.json` holds."""

    url: str
    validator: str
    length: int | None


@contextlib.contextmanager
def asking(
    client: "httpx.Client", url: str, headers: dict[str, str], limits: Limits, left_s: float
) -> "Iterator[httpx.Response]":
    """The answer to one GET, its body not read yet. Problem for what the transport does, also while it is read."""
    import httpx  # noqa: PLC0415

    timeout = httpx.Timeout(min(limits.stall_s, left_s), connect=min(limits.connect_s, left_s))
    try:
        with client.stream("GET", url, headers=headers, timeout=timeout) as response:
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _transport_problem(error, limits) from error


def check_status(response: "httpx.Response", done: int) -> None:
    """Problem unless a body of the file follows."""
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


def origin_of(response: "httpx.Response", url: str) -> Origin:
    """What identifies this body. A weak ETag does not promise equal bytes; a date is better than nothing."""
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    length = response.headers.get("Content-Length", "")
    return Origin(shown(url), etag if etag.startswith('"') else date, int(length) if length.isdecimal() else None)


def continues(response: "httpx.Response", known: Origin, now: Origin, done: int) -> bool:
    """Whether a 206 is the rest of the same file; some servers send one although If-Range does not hold."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not match or int(match[1]) != done:
        return False
    same_length = match[2] == "*" or known.length in {None, int(match[2])}
    return same_length and now.validator in {"", known.validator}


def new_client(limits: Limits) -> "httpx.Client":
    """What asks, with the proxies of the environment. FetchError when those are unusable."""
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


def _transport_problem(error: Exception, limits: Limits) -> Problem:
    import httpx  # noqa: PLC0415

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
