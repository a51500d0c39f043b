"""`.gitignore` files, parsed and matched as git does: gitignore(5). Paths are bytes, relative to the tree's root."""

import re
from collections.abc import Collection
from functools import cached_property

import msgspec

FILE = b".gitignore"
STAR = rb"[^/\0]*"
ESCAPED = re.compile(rb"\\(\W)", re.ASCII)
LITERAL = re.compile(rb"(?:\\\W|[^\\()\[\]{}?*+|^$.])+", re.ASCII)
"""A regular expression that matches a single text."""
CLASSES = {
    b"alnum": b"0-9A-Za-z",
    b"alpha": b"A-Za-z",
    b"blank": rb" \t",
    b"cntrl": rb"\x01-\x1f\x7f",
    b"digit": b"0-9",
    b"graph": rb"\x21-\x7e",
    b"lower": b"a-z",
    b"print": rb"\x20-\x7e",
    b"punct": rb"\x21-/:-@\x5b-`{-~",
    b"space": rb"\t-\r ",
    b"upper": b"A-Z",
    b"xdigit": b"0-9A-Fa-f",
}


class IgnoreRule(msgspec.Struct, frozen=True, dict=True):
    """One line. `path`: it is matched against the path below the file's folder, not against the last name.

    `depth`: the number of folders in a path that it matches; None if not fixed.
    """

    pattern: bytes
    path: bool
    folders_only: bool
    negated: bool
    depth: int | None = None

    @cached_property
    def expression(self) -> re.Pattern[bytes]:
        """The pattern, compiled on first use."""
        return re.compile(self.pattern, re.DOTALL)


class IgnoreRules(msgspec.Struct, frozen=True):
    """The rules of the `.gitignore` in the folder `base` (empty, or ending in `/`), on top of those of `above`.

    The other fields are derived from them.
    """

    base: bytes
    rules: tuple[IgnoreRule, ...]
    above: "IgnoreRules | None" = None
    whole: frozenset[bytes] = frozenset()
    suffixes: tuple[bytes, ...] = ()
    by_name: re.Pattern[bytes] | None = None
    by_path: re.Pattern[bytes] | None = None
    depths: frozenset[int | None] = frozenset()
    """The depths of the rules that match paths; in most folders there are none."""
    certain: tuple[frozenset[bytes], tuple[bytes, ...]] = (frozenset(), ())
    """Last names, and suffixes of them, that are ignored whatever else matches."""

    def __post_init__(self) -> None:
        """Derive fast checks, because most paths match no rule: last names, their suffixes, then expressions."""
        names, ends, rest = set(), [], []
        sure_names, sure_ends = set(), []
        for rule in self.rules:
            literal = rule.pattern.removeprefix(STAR)
            if rule.path:
                continue
            if not LITERAL.fullmatch(literal):
                rest.append(rule.pattern)
                continue
            plain = ESCAPED.sub(rb"\1", literal)
            is_name = literal == rule.pattern
            names.add(plain) if is_name else ends.append(plain)
            if not rule.folders_only:
                sure_names.add(plain) if is_name else sure_ends.append(plain)
        negated = any(rule.negated for rule in self.rules)
        by_path = [rule.pattern for rule in self.rules if rule.path]
        made = {
            "whole": frozenset(names),
            "suffixes": tuple(ends),
            "by_name": _any_of(rest),
            "by_path": _any_of(by_path),
            "depths": frozenset(rule.depth for rule in self.rules if rule.path),
            "certain": (frozenset(), ()) if negated else (frozenset(sure_names), tuple(sure_ends)),
        }
        for what, value in made.items():
            msgspec.structs.force_setattr(self, what, value)

    def candidates(self, folder_path: bytes, names: Collection[bytes]) -> set[bytes]:
        """The `names` in a folder that a rule matches; another rule may re-include them."""
        found: set[bytes] = set()
        level: IgnoreRules | None = self
        while level is not None:
            whole, suffixes = level.whole, level.suffixes
            found.update(whole.intersection(names))
            if suffixes:
                found.update([name for name in names if name.endswith(suffixes)])
            below = folder_path[len(level.base) :]
            deep = None in level.depths or below.count(b"/") in level.depths
            for expression, lead in ((level.by_name, b""), (level.by_path if deep else None, below)):
                if expression is not None:
                    text = b"\0" + lead + (b"\0" + lead).join(names) + b"\0"
                    found.update(path[len(lead) :] for path in expression.findall(text))
            level = level.above
        return found

    def ignores(self, folder_path: bytes, name: bytes, *, folder: bool) -> bool:
        """Whether `name` in the folder `folder_path` (ends in `/`) is ignored, given that no folder above it is."""
        level: IgnoreRules | None = self
        while level is not None:
            names, ends = level.certain
            if name in names or name.endswith(ends):
                return True
            below = folder_path[len(level.base) :] + name
            for rule in reversed(level.rules):
                if (folder or not rule.folders_only) and rule.expression.fullmatch(below if rule.path else name):
                    return not rule.negated
            level = level.above
        return False


def _any_of(patterns: list[bytes]) -> re.Pattern[bytes] | None:
    return re.compile(rb"\0(" + b"|".join(patterns) + rb")(?=\0)") if patterns else None


def parse(text: bytes, base: bytes = b"", above: IgnoreRules | None = None) -> IgnoreRules | None:
    """Parse the text of a file; returns `above` if it holds no rules."""
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rules = tuple(rule for line in lines if (rule := _parse_line(line.removesuffix(b"\r"))) is not None)
    return IgnoreRules(base, rules, above) if rules else above


def _parse_line(line: bytes) -> IgnoreRule | None:
    line = line.partition(b"\0")[0]
    if line.startswith(b"#"):
        return None
    while line.endswith(b" ") and not re.search(rb"(?<!\\)(\\\\)*\\ \Z", line):
        line = line[:-1]
    negated = line.startswith(b"!")
    line = line[1:] if negated else line
    folders_only = line.endswith(b"/")
    line = line[:-1] if folders_only else line
    path = b"/" in line
    line = line.removeprefix(b"/")
    expression = _expression(line) if line else None
    if expression is None:
        return None
    certain = not any(special in line for special in (b"**", b"[", b"\\"))
    return IgnoreRule(expression, path, folders_only, negated, line.count(b"/") if certain else None)


def _expression(glob: bytes) -> bytes | None:
    """The glob as a regular expression; None if it matches nothing. `**` is special only as a whole component."""
    words: list[bytes] = []
    at = 0
    while at < len(glob):
        char = glob[at : at + 1]
        if char == b"*":
            text, at = _stars(glob, at, len(glob) - len(glob[at:].lstrip(b"*")))
        elif char == b"?":
            text, at = rb"[^/\0]", at + 1
        elif char == b"[":
            found = _bracket(glob, at)
            if found is None:
                return None
            text, at = found
        elif char == b"\\":
            if at + 1 == len(glob):
                return None
            text, at = re.escape(glob[at + 1 : at + 2]), at + 2
        else:
            text, at = re.escape(char), at + 1
        words.append(text)
    return _joined(words)


def _joined(words: list[bytes]) -> bytes:
    """Join the words into one expression. Text between two stars matches at its first position, without backtracking.

    This is always correct, as in fnmatch of the standard library, and avoids exponential time for many stars.
    """
    parts: list[list[bytes]] = [[]]
    for word in words:
        if word == STAR:
            parts.append([])
        else:
            parts[-1].append(word)
    first, *rest = [b"".join(part) for part in parts]
    between = [b"(?>" + STAR + b"?" + part + b")" if rb"[^\0]*" not in part else STAR + part for part in rest[:-1]]
    return first + b"".join(between) + (STAR + rest[-1] if rest else b"")


def _stars(glob: bytes, start: int, end: int) -> tuple[bytes, int]:
    whole = end - start > 1 and (start == 0 or glob[start - 1 : start] == b"/")
    if whole and glob[end : end + 1] == b"/":
        return rb"(?:[^\0]*/)?", end + 1
    return rb"[^\0]*" if whole and end == len(glob) else STAR, end


def _bracket(glob: bytes, at: int) -> tuple[bytes, int] | None:
    """A bracket expression and the offset of its end; None if it is not closed."""
    at += 1
    negated = glob[at : at + 1] in (b"!", b"^")
    at += negated
    members: list[bytes] = []
    first = True
    while first or glob[at : at + 1] != b"]":
        first = False
        if at >= len(glob):
            return None
        if named := re.compile(rb"\[:([^\]]*):\]").match(glob, at):
            if named[1] not in CLASSES:
                return None
            members.append(CLASSES[named[1]])
            at = named.end()
            continue
        low, at = _bracket_char(glob, at)
        if glob[at : at + 1] == b"-" and glob[at + 1 : at + 2] not in (b"]", b""):
            high, at = _bracket_char(glob, at + 1)
            members += [b"\\x%02x-\\x%02x" % (low, high)] if low <= high else []
        else:
            members.append(b"\\x%02x" % low)
        if low < 0:
            return None
    inside = b"".join(members)
    if negated:
        return rb"[^/\0" + inside + b"]", at + 1
    return (b"(?!/)[" + inside + b"]" if inside else b"(?!)"), at + 1


def _bracket_char(glob: bytes, at: int) -> tuple[int, int]:
    """A character, possibly escaped, and the offset of the next one."""
    if glob[at : at + 1] == b"\\" and at + 1 < len(glob):
        at += 1
    return glob[at], at + 1
