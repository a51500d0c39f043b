"""The bytes of a wanted file: decompressed, hashed and written in one pass, and compared with what was promised.

The state of a hash or of a decompressor cannot be saved, so a later run that resumes feeds the part from disk through
the same pass; a resume in the same run goes on.
"""

import bz2
import functools
import hashlib
import lzma
import queue
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from vmtasks.installer.download.want import Algorithm, Digest, Of, WantedFile

BLOCK = 256 * 1024
"""Bytes handled at once."""
QUEUED = 32
"""Blocks between the network and the decompressor: half a second of work for bzip2."""
HEAD = 512
"""Bytes at the start that are looked at for HTML."""
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html)", re.IGNORECASE)
NETWORK_HINT = (
    "check the network and HTTP_PROXY, HTTPS_PROXY, NO_PROXY; then run it again, what has arrived is kept;"
    " a file:// URL or a path to a file that you have is accepted too"
)


class Problem(Exception):  # noqa: N818 - not an error until all mirrors have been tried
    """This URL did not give the file: `again` if it still may, `poison` if what has arrived must not be kept."""

    def __init__(
        self, reason: str, hint: str = NETWORK_HINT, *, again: bool = False, poison: bool = False, wait_s: float = 0
    ) -> None:
        """`reason` ends the sentence `URL ...`; `wait_s` is how long the server asks to be left alone."""
        super().__init__(reason)
        self.hint = hint
        self.again = again
        self.poison = poison
        self.wait_s = wait_s


def bad(reason: str) -> Problem:
    """A Problem: the bytes are not those of the file that was promised."""
    hint = "the file there is damaged or was replaced, or the digest in the configuration is another file's: compare it"
    return Problem(reason, f"{hint} with what the project publishes, or use another mirror", poison=True)


def html_page() -> Problem:
    """A Problem: the server sent a page for people instead of a file."""
    hint = "look at the URL in a browser: a login page of the network, a mirror that moved, or a missing file"
    return Problem("sent an HTML page, not the file", hint, poison=True)


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


class Unpacker:
    """Compressed blocks in, plain blocks of bounded size out, over all streams of the file (pbzip2 makes many)."""

    def __init__(self, packing: str) -> None:
        self._packing = packing
        self._stream: _Stream | None = None
        self._ended = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decompress the next bytes. Problem for what is not, or not only, data of this compression."""
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
                raise bad(f"{what} {self._packing} data") from error
            yield plain
            data = b""
            if self._stream.eof:
                data, self._stream, self._ended = self._stream.unused_data, None, self._ended + 1
            elif self._stream.needs_input:
                return

    def finish(self) -> None:
        """Raise Problem when the data stop in the middle."""
        if self._packing and (self._stream is not None or not self._ended):
            raise bad(f"ends in the middle of its {self._packing} data")


class Pass:
    """The one pass over the bytes of one file from its first. A thread decompresses, hashes and writes the content."""

    def __init__(self, want: WantedFile, output: Path | None) -> None:
        """`output` is None when the content is what the caller writes anyway."""
        self.received = 0
        self.size = 0
        self._head: bytes | None = b""
        self._promises = want.promises
        self._hashes: dict[tuple[Of, Algorithm], hashlib._Hash] = {("content", "sha256"): hashlib.sha256()}
        for digest in self._promises:
            self._hashes[digest.of, digest.algorithm] = hashlib.new(digest.algorithm, usedforsecurity=False)
        self._unpacker = Unpacker(want.packing)
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
                raise html_page()
            if len(self._head) < HEAD:
                return
            block, self._head = self._head, None
        self._blocks.put(block)

    def finish(self) -> frozenset[Digest]:
        """Wait until all is written; return the digests. Problem if they are not those that were promised."""
        if self._head:
            self._blocks.put(self._head)
        self.close()
        if self._error is not None:
            raise self._error
        if not self.received:
            raise bad("is empty")
        self._unpacker.finish()
        got = {(of, name): Digest(name, sum_.hexdigest(), of) for (of, name), sum_ in self._hashes.items()}
        for promise in sorted(self._promises, key=str):
            found = got[promise.of, promise.algorithm]
            if found != promise:
                raise bad(f"has the {found.algorithm} {found.hex} ({found.of}), not {promise.hex}")
        return frozenset(got.values())

    def close(self) -> None:
        """End the thread and close the output. May be called twice."""
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
        """Write the blocks. After an error go on taking them, so that feed() never waits for room in the queue."""
        while (block := self._blocks.get()) is not None:
            if self._error is None:
                try:
                    for plain in self._unpacker.feed(block):
                        self._update("content", plain)
                        self.size += len(plain)
                        if self._output is not None:
                            write_all(self._output, plain)
                except Exception as error:  # noqa: BLE001 - raised again by feed() or finish()
                    self._error = error


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of `data`: an unbuffered write may take only some of the bytes."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def holds(path: Path, digests: Iterable[Digest]) -> bool:
    """Whether the file exists and has all these digests of content."""
    sums = {d: hashlib.new(d.algorithm, usedforsecurity=False) for d in digests}
    try:
        with path.open("rb") as data:
            while block := data.read(BLOCK):
                for sum_ in sums.values():
                    sum_.update(block)
    except FileNotFoundError:
        return False
    return all(sum_.hexdigest() == digest.hex for digest, sum_ in sums.items())
