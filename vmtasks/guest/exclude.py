"""What rsync's patterns exclude, as far as they are simple: a digest needs no rsync to know what a sync would send."""

import os
import re
from collections.abc import Sequence

import msgspec


class Excluder(msgspec.Struct, frozen=True):
    """What simple rsync patterns say of a whole path, as bytes (folders end in `/`)."""

    runs: tuple[tuple[bool, re.Pattern[bytes]], ...] = ()
    whole: bool = True
    """Whether all patterns are understood; else what no run matches may be kept by one that is not."""

    def excludes(self, path: bytes) -> bool | None:
        """True: excluded. False: kept, or perhaps so. None: no pattern speaks of it."""
        for excluded, expression in self.runs:
            if expression.fullmatch(path):
                return excluded
        return None if self.whole else False


def excluder(patterns: Sequence[str]) -> Excluder:
    """Of the patterns that rsync is given, those that are simple, in their order: the first that matches decides.

    What is not simple is left out, after such a `+` also what follows, which it may keep, and what is before a `!`,
    which clears the list. A digest that sees too much only runs a suite once more.
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
    """The patterns that count for rsync: those after the last `!`, which clears its list."""
    return patterns[max((n for n, pattern in enumerate(patterns, 1) if pattern == "!"), default=0) :]


def _simple(pattern: bytes) -> bytes | None:
    """The pattern as an expression for whole paths; None when it is not simple."""
    body = pattern.removeprefix(b"/").removesuffix(b"/")
    if not body or body.startswith((b"/", b"- ", b"!")) or re.search(rb"\*\*|[\[\\]|//|/\Z", body):
        return None
    words = {b"*": b"[^/]*", b"?": b"[^/]"}
    simple = b"".join(words.get(c, re.escape(c)) for c in (body[i : i + 1] for i in range(len(body))))
    start = b"" if pattern.startswith(b"/") else b"(?:.*/)?"
    return start + simple + rb"(?<!/)" + (b"/" if pattern.endswith(b"/") else b"/?")


def literal(path: bytes) -> bytes:
    """The rsync pattern for just this path of the tree. A backslash is one only where there is a wildcard."""
    return b"/" + (re.sub(rb"([\\*?\[])", rb"\\\1", path) if re.search(rb"[*?\[]", path) else path)
