"""A real HTTP server on loopback that misbehaves as it is told, and remembers what it was asked and what it sent."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """How to answer one request. The defaults are those of a good mirror. Counts are bytes of the body."""

    status: int = 200
    body: bytes | None = None
    etag: str = '"v1"'
    modified: str = ""
    content_type: str = "application/octet-stream"
    location: str = ""
    retry_after: str = ""
    cut_after: int | None = None
    stall_after: int | None = None
    ranges: bool = True
    heed_if_range: bool = True
    skipped: int = 0  # bytes that a 206 leaves out
    announce_length: bool = True
    pause_s: float = 0
    chunk: int = 64 * 1024


@dataclass
class Asked:
    """One request: its path, the two headers that matter for resuming, and how many bytes of a body it was sent."""

    path: str
    range: str
    if_range: str
    sent: int = 0


@dataclass
class Site:
    """What is served. `replies` are used up one per request; then `usual` holds."""

    files: dict[str, bytes]
    replies: list[Reply] = field(default_factory=list)
    usual: Reply = field(default_factory=Reply)
    asked: list[Asked] = field(default_factory=list)
    base: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        """`path` without a slash before it."""
        return f"{self.base}/{path}"

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(asked.sent for asked in self.asked)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    site: Site


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        site = self.server.site
        path = urlsplit(self.path).path.lstrip("/")  # a proxy is asked for a whole URL
        asked = Asked(path, self.headers.get("Range", ""), self.headers.get("If-Range", ""))
        site.asked.append(asked)
        reply = site.replies.pop(0) if site.replies else site.usual
        whole = site.files.get(path) if reply.body is None else reply.body
        if reply.status != 200 and reply.body is None:
            whole = b""
        if whole is None:
            reply, whole = Reply(404, content_type="text/html"), b"<html>no such file</html>"
        with contextlib.suppress(ConnectionError):
            self._body(reply, asked, whole, self._headers(reply, asked, whole))

    def _headers(self, reply: Reply, asked: Asked, whole: bytes) -> int:
        """Send status and headers; gives where the body starts."""
        start = self._start(reply, asked, whole)
        status = reply.status
        if start >= len(whole) > 0:
            status, start = 416, len(whole)
        elif start:
            status = 206
        self.send_response(status)
        for name, value in {
            "Content-Type": reply.content_type,
            "ETag": reply.etag,
            "Last-Modified": reply.modified,
            "Location": reply.location,
            "Retry-After": reply.retry_after,
            "Content-Length": str(len(whole) - start) if reply.announce_length else "",
            "Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}" if status == 206 else "",
            "Connection": "" if reply.announce_length else "close",
        }.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        return start

    def _start(self, reply: Reply, asked: Asked, whole: bytes) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", asked.range)
        same = asked.if_range in {"", reply.etag, reply.modified} or not reply.heed_if_range
        return int(match[1]) + reply.skipped if match and whole and reply.ranges and reply.status == 200 and same else 0

    def _body(self, reply: Reply, asked: Asked, whole: bytes, start: int) -> None:
        stops = [stop for stop in (reply.cut_after, reply.stall_after) if stop is not None]
        end = min([start + stop for stop in stops] + [len(whole)])
        for at in range(start, end, reply.chunk):
            self.wfile.write(whole[at : min(at + reply.chunk, end)])
            asked.sent += min(at + reply.chunk, end) - at
            if reply.pause_s and self.server.site.closing.wait(reply.pause_s):
                break
        self.wfile.flush()
        if reply.stall_after is not None:
            self.server.site.closing.wait(30)
        if stops or not reply.announce_length:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@contextlib.contextmanager
def serving(files: dict[str, bytes], *replies: Reply) -> Iterator[Site]:
    """Serve `files` (path without the first slash -> bytes) until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.site = Site(files, list(replies), base=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    try:
        yield server.site
    finally:
        server.site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
