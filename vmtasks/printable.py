"""PURE: untrusted text, made safe for a terminal by removing control sequences.

A guest's text reaches a terminal in error messages, tables, progress and live output. A control sequence in it could
rename the window, rewrite earlier lines, or type an answer into the shell. All of it goes through here.
"""

import codecs
import re

# ECMA-48: CSI with parameters, OSC strings (a terminal's title), and other escapes of two characters, each also as the
# single C1 character for these two. Lengths are bounded: anything longer is no escape, so that the result does not
# depend on how the input is cut.
_CSI, _OSC, _OTHER = r"[0-?]{0,64}[ -/]{0,8}", r"[^\x07\n\r\x1b\x9c]{0,256}", r"[ -/]{0,8}"
_IN_CSI, _IN_OSC = r"(?:\x1b\[|\x9b)", r"(?:\x1b\]|\x9d)"
_ESCAPE = rf"{_IN_CSI}{_CSI}[@-~]|{_IN_OSC}{_OSC}(?:\x07|\x1b\\|\x9c)|\x1b{_OTHER}[0-Z\\^-~]"
_UNFINISHED = rf"(?:{_IN_CSI}{_CSI}|{_IN_OSC}{_OSC}\x1b?|\x1b{_OTHER})\Z"
_COLOR = r"(?:\x1b\[|\x9b)([0-9;:]{0,64})m"
_SURROGATE = r"[\ud800-\udfff]"

# C0 except tab, line feed and carriage return; DEL and C1; characters that change the direction of writing, and two
# separators that some programs treat as line ends.
_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
RESET = "\x1b[0m"


def text(said: str) -> str:
    """Clean text of several lines; tabs stay."""
    return _plain(said).replace("\r", "")


def line(said: str) -> str:
    """Clean text on one line: a name, a title, a table cell."""
    return " ".join(_plain(said).split())


def _plain(said: str) -> str:
    if said.isascii() and said.replace("\n", "").isprintable():  # the usual case; does not compile the expressions
        return said
    return re.sub(_SURROGATE, "\ufffd", re.sub(_CONTROL, "", re.sub(_ESCAPE, "", said)))


class Cleaner:
    """A stream of bytes -> text without control sequences and carriage returns, however the stream is cut."""

    def __init__(self) -> None:
        """Nothing is pending yet."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""

    def feed(self, data: bytes) -> str:
        """The text that `data` adds. An incomplete control sequence is held back."""
        return text(self._complete(data))

    def _complete(self, data: bytes, waits: str = "") -> str:
        """The text so far; an incomplete control sequence or, without one, `waits` at its end is held back."""
        said = self._pending + self._decoder.decode(data)
        held = re.search(_UNFINISHED, said)
        at = held.start() if held else len(said.removesuffix(waits))
        self._pending = said[at:]
        return said[:at]


class Live(Cleaner):
    """A program's live output: as Cleaner, but colours stay, and a carriage return begins a new line."""

    def __init__(self) -> None:
        """Nothing is pending yet."""
        super().__init__()
        self._colored = False

    def feed(self, data: bytes) -> str:
        """The text that `data` adds. An incomplete control sequence or line end is held back."""
        return self._shown(self._complete(data, "\r"))

    def end(self) -> str:
        """The text held back, and the end of all colours."""
        rest = self._shown(self._pending + self._decoder.decode(b"", final=True))
        self._pending = ""
        return rest + (RESET if self._colored else "")

    def _shown(self, said: str) -> str:
        words = re.split(_COLOR, said.replace("\r\n", "\n").replace("\r", "\n"))
        self._colored = self._colored or len(words) > 1
        return "".join(f"\x1b[{word}m" if number % 2 else text(word) for number, word in enumerate(words))
