"""A live line on a terminal. Owns rich, which is slow to import and needed only on a terminal."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

Write = Callable[[TextIO, str], None]


@contextmanager
def live_line(text: Callable[[], str], stream: TextIO | None, write: Write, *, color: bool) -> Iterator[None]:
    """Keep one line of the terminal `stream` up to date with `text()`, and clear it at the end.

    `write` writes to the stream, and raises nothing if the terminal is closed.
    """
    out = cast("TextIO", _Unbreakable(stream, write)) if stream else None
    console = Console(file=out, no_color=not color, highlight=False)
    spinner = Spinner("dots", style="cyan" if color else "")

    def render() -> Spinner:
        spinner.update(text=Text(text(), overflow="ellipsis", no_wrap=True))
        return spinner

    with Live(get_renderable=render, console=console, refresh_per_second=8, transient=True, redirect_stdout=False):
        yield


class _Unbreakable(io.TextIOBase):
    """A terminal that may be closed at any moment: a failed write must not end the work or its clean-up.

    Writes fail with EIO before SIGHUP arrives; SIGHUP ends us.
    """

    def __init__(self, stream: TextIO, write: Write) -> None:
        self._stream, self._write = stream, write

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        self._write(self._stream, "")
