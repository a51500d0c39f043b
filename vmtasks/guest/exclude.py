"""rsync's exclude patterns, as far as they are simple, as regular expressions: a digest then needs no rsync."""

import os
import re
from collections.abc import Sequence

import msgspec


class Excluder(msgspec.Struct, frozen=True):
    """Matches whole paths, as bytes (folders end in `/`), against simple rsync patterns."""

    runs: tuple[tuple[bool, re.Pattern[bytes]], ...] = ()
    whole: bool = True
    """Whether all patterns are simple. If not, a path without a match may be kept by a later pattern."""

    def excludes(self, path: bytes) -> bool | None:
        """True: excluded. False: included, or possibly so. None: no pattern matches."""
        for excluded, expression in self.runs:
            if expression.fullmatch(path):
                return excluded
        return None if self.whole else False


def excluder(patterns: Sequence[str]) -> Excluder:
    """Compile the simple patterns of rsync's list in their order: the first match decides.

    Skips patterns that are not simple, all patterns after such a `+`, which may include their matches, and all before
    a `!`, which clears the list. A digest over too many files only runs a suite once more.
    """
    runs: list[tuple[bool, list[bytes]]] = []
    whole = True
    for pattern in map(os.fsencode, effective(patterns)):
        excluded = not pattern.startswith(b"+ ")
        expression = _simple(pattern.removeprefix(b"+ "))
        if expression is None and not excluded:
            whole = False
            break
        if expression is not None:
            if not runs or runs[-1][0] != excluded:
                runs.append((excluded, []))
            runs[-1][1].append(expression)
    made = ((excluded, re.compile(b"|".join(parts), re.DOTALL)) for excluded, parts in runs)
    return Excluder(tuple(made), whole)


def effective(patterns: Sequence[str]) -> Sequence[str]:
    """The patterns in effect for rsync: those after the last `!`, which clears its list."""
    return patterns[max((n for n, pattern in enumerate(patterns, 1) if pattern == "!"), default=0) :]


def _simple(pattern: bytes) -> bytes | None:
    """The pattern as a regular expression for whole paths; None if it is not simple."""
    body = pattern.removeprefix(b"/").removesuffix(b"/")
    if not body or body.startswith((b"/", b"- ", b"!")) or re.search(rb"\*\*|[\[\\]|//|/\Z", body):
        return None
    words = {b"*": b"[^/]*", b"?": b"[^/]"}
    simple = b"".join(words.get(c, re.escape(c)) for c in (body[i : i + 1] for i in range(len(body))))
    start = b"" if pattern.startswith(b"/") else b"(?:.*/)?"
    return start + simple + rb"(?<!/)" + (b"/" if pattern.endswith(b"/") else b"/?")


def literal(path: bytes) -> bytes:
    """The rsync pattern that matches only this path. rsync reads a backslash as an escape only beside a wildcard."""
    return b"/" + (re.sub(rb"([\\*?\[])", rb"\\\1", path) if re.search(rb"[*?\[]", path) else path)
