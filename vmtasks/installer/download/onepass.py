"""The one pass over the bytes of a file in which they are hashed, decompressed and written.

The state of a hash or of a decompressor cannot be saved, so a later run that resumes feeds the part from disk through
the same pass; a resume in the same run goes on.
"""

import hashlib
import queue
import re
import threading
from pathlib import Path
from typing import BinaryIO

from vmtasks.installer.download.decompress import Unpacker
from vmtasks.installer.download.digest import Algorithm, Digest, Of
from vmtasks.installer.download.problem import bad, html_page
from vmtasks.installer.download.want import Want

QUEUED = 32
"""Blocks between the network and the decompressor: half a second of work for bzip2."""
HEAD = 512
"""Bytes at the start that are looked at for HTML."""
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html)", re.IGNORECASE)


class Pass:
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
        """Wait until all is written; the digests. Problem if they are not those that were promised."""
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
                            write_all(self._output, plain)
                except Exception as error:  # noqa: BLE001 - raised again by feed() or finish()
                    self._error = error


def write_all(file: BinaryIO, data: bytes) -> None:
    """An unbuffered write may take only some of the bytes."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
