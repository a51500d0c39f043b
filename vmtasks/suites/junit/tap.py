"""TAP, versions 12 to 14 -> test cases."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from vmtasks.suites.junit.case import Case

_VERSION = re.compile(r"TAP version \d+\s*$", re.ASCII)
_PLAN = re.compile(r"1\.\.(?P<count>\d{1,9})\s*(?:#(?P<why>.*))?$", re.ASCII)
_SURE = re.compile(
    r"TAP version \d+\s*$|not ok \d{1,9}(?:\s|$)|ok \d{1,9} - |1\.\.0\s*#\s*(?i:skip)|\s*(?i:Bail out!)", re.ASCII
)
_POINT = re.compile(r"(?P<not>not )?ok(?:\s+(?P<number>\d{1,9})(?=\s|$))?(?:\s+-)?(?:\s+(?P<title>.*))?$", re.ASCII)
_DIRECTIVE = re.compile(r"(?<!\\)#\s*(?P<what>todo|skip(?:ped|ping)?)\b[:\s]*(?P<why>.*)$", re.IGNORECASE)
_BAIL_OUT = re.compile(r"\s*Bail out!\s*(?P<why>.*)$", re.IGNORECASE)
_YAML_MESSAGE = re.compile(r"\s+message:\s*(?P<quote>['\"]?)(?P<text>[^|>\s].*?)(?P=quote)$")


Kind = Literal["sure", "plan", "point"]
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (("sure", _SURE), ("plan", _PLAN), ("point", _POINT))


def kind(line: str) -> Kind | None:
    """Classify a line of TAP; `sure`: hardly any other program prints such a line.

    Other programs print `1..5` or `ok 3 files` by chance.
    """
    return next((name for name, pattern in _KINDS if pattern.match(line)), None)


def cases(log: str) -> list[Case]:
    """Read one or more TAP streams; indented subtests are part of the test point that follows them.

    A missing plan, a wrong plan, a duplicate number and "Bail out!" each make an error case. The output before a failed
    test point and the diagnostics after it are its text.
    """
    reader = _Reader()
    for line in log.split("\n"):
        reader.feed(line.rstrip())
    if reader.streams == [_Stream()]:
        return [Case("TAP plan", "error", "no TAP in the output")]
    return [case for stream in reader.streams for case in stream.cases()]


@dataclass
class _Point:
    """A test line, with the output `before` it (subtests too) and the diagnostics `after` it."""

    ok: bool
    number: int
    title: str
    before: list[str]
    after: list[str] = field(default_factory=list)

    def case(self) -> Case:
        directive = _DIRECTIVE.search(self.title)
        title = self.title[: directive.start()] if directive else self.title
        name = re.sub(r"\\([\\#])", r"\1", title).strip() or f"test {self.number}"
        if directive and directive["what"].lower() == "todo":
            if not self.ok:
                return Case(name, "skipped", f"todo: {directive['why']}".rstrip(": "), self.text())
        elif directive and self.ok:
            return Case(name, "skipped", directive["why"])
        return Case(name, "passed") if self.ok else Case(name, "failed", self.message(), self.text())

    def text(self) -> str:
        return "\n".join([*self.before, *self.after])

    def message(self) -> str:
        said = [match["text"] for match in map(_YAML_MESSAGE.match, self.after) if match]
        said += [line.lstrip("# ") for line in self.after if line.startswith("#") and line.strip("# ")]
        return said[0] if said else "not ok"


@dataclass
class _Stream:
    """One TAP document: a plan, before or after its test points."""

    points: list[_Point] = field(default_factory=list)
    plan: int | None = None
    plan_last: bool = False
    skip_reason: str = ""
    bailed: str | None = None
    has_version: bool = False

    def is_over(self, number: int | None) -> bool:
        """Whether a test point with this number belongs to the next stream: `make test` may print several."""
        if self.bailed is not None or self.plan_last:
            return True
        return self.plan is not None and len(self.points) >= self.plan and number == 1

    def problems(self) -> Iterator[str]:
        """Why the stream is incomplete."""
        ran, numbers = len(self.points), Counter(point.number for point in self.points)
        twice = [number for number, times in numbers.items() if times > 1]
        if twice:
            yield f"more than one test has the number {min(twice)}"
        if self.bailed is not None:
            yield f"bailed out: {self.bailed}".rstrip(": ")
        elif self.plan is None:
            yield f"no plan (1..N): whether the tests that ran, {ran}, were all is not known"
        elif ran != self.plan:
            yield f"planned {self.plan} tests, ran {ran}"
        elif any(not 1 <= number <= self.plan for number in numbers):
            yield f"a test has a number outside of the plan 1..{self.plan}"

    def cases(self) -> Iterator[Case]:
        yield from (point.case() for point in self.points)
        if self.plan == 0 and not self.points and self.bailed is None:
            yield Case("all tests", "skipped", self.skip_reason)
        yield from (Case("TAP plan", "error", problem) for problem in self.problems())


class _Reader:
    """Lines in, streams out."""

    def __init__(self) -> None:
        self.streams = [_Stream()]
        self.pending: list[str] = []
        self.yaml_indent = ""

    def feed(self, line: str) -> None:
        """Take in one line."""
        stream = self.streams[-1]
        if self.yaml_indent and self._yaml(line, stream):
            return
        if bail := _BAIL_OUT.match(line):
            stream.bailed = bail["why"].strip()
        elif _VERSION.match(line):
            self._next(stream).has_version = True
        elif plan := _PLAN.match(line):
            self._plan(plan, stream)
        elif point := _POINT.match(line):
            self._point(point, stream)
        elif stream.points and line.startswith("#") and not line.startswith("# Subtest"):
            stream.points[-1].after.append(line)
        elif stream.points and not self.pending and line[:1].isspace() and line.strip() == "---":
            self.yaml_indent = line[: line.index("-")]
            stream.points[-1].after.append(line)
        elif line:
            self.pending.append(line)

    def _yaml(self, line: str, stream: _Stream) -> bool:
        """Add a line to a YAML block; False, which ends the block, if it is not indented like the block."""
        if line and not line.startswith(self.yaml_indent):
            self.yaml_indent = ""
            return False
        stream.points[-1].after.append(line)
        if line == f"{self.yaml_indent}...":
            self.yaml_indent = ""
        return True

    def _next(self, stream: _Stream) -> _Stream:
        """Begin another stream, unless this one is still empty."""
        if stream == _Stream():
            return stream
        self.streams.append(_Stream())
        return self.streams[-1]

    def _plan(self, plan: re.Match[str], stream: _Stream) -> None:
        if stream.plan is not None or stream.bailed is not None:
            stream = self._next(stream)
        stream.plan, stream.plan_last = int(plan["count"]), bool(stream.points)
        stream.skip_reason = re.sub(r"(?i)^\s*skip\S*\s*", "", plan["why"] or "").strip()

    def _point(self, point: re.Match[str], stream: _Stream) -> None:
        number = int(point["number"]) if point["number"] else None
        if stream.is_over(number):
            stream = self._next(stream)
        if number is None:
            number = stream.points[-1].number + 1 if stream.points else 1
        stream.points.append(_Point(not point["not"], number, point["title"] or "", self.pending))
        self.pending = []
