"""Compressed blocks in, plain blocks of bounded size out: bzip2, gzip and xz, however many streams a file has."""

import bz2
import functools
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from vmtasks.installer.download.problem import bad

BLOCK = 256 * 1024
"""Bytes given out at once."""


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
        """Problem for what is not, or not only, data of this compression."""
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
        """Problem when the data stop in the middle."""
        if self._packing and (self._stream is not None or not self._ended):
            raise bad(f"ends in the middle of its {self._packing} data")
