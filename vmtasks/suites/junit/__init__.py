"""What a suite left behind -> JUnit XML: its own JUnit file, TAP, `go test -json`, or the plain exit status. PURE."""

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal
from xml.etree import ElementTree as ET

from vmtasks.host.process import Ended
from vmtasks.suites.junit import gotest, own, tap
from vmtasks.suites.junit.case import LOG_LIMIT, TEXT_LIMIT, Case, Outcome, clean, one_line, seconds, shorten

Format = Literal["auto", "tap", "go-json", "junit", "plain"]


@dataclass(frozen=True)
class Counts:
    """How a suite's test cases ended."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: int = 0

    @property
    def total(self) -> int:
        """All test cases."""
        return self.passed + self.failed + self.skipped + self.errors

    @property
    def green(self) -> bool:
        """Nothing failed."""
        return not (self.failed or self.errors)

    def __str__(self) -> str:
        """For messages: `7 passed, 1 failed, 2 skipped`."""
        errors = "error" if self.errors == 1 else "errors"
        shown = [(self.passed, "passed"), (self.failed, "failed"), (self.errors, errors), (self.skipped, "skipped")]
        return ", ".join(f"{number} {what}" for number, what in shown if number) or "no tests"


@dataclass(frozen=True)
class Report:
    """JUnit XML, its counts, and in one sentence the first problem that is not a failed test of the suite itself."""

    xml: bytes
    counts: Counts
    trouble: str


def report(
    name: str,
    output: str,
    *,
    ended: Ended | None,
    duration_s: float,
    fmt: Format,
    own_xml: bytes | None,
    problem: str = "",
) -> Report:
    """Write the result of the suite `name` as JUnit XML, and count its cases.

    `own_xml` is the JUnit file that the suite wrote, if any; it takes precedence over `output`. `problem`: why that
    file is missing or, with `ended` None, why the suite's end is unknown. The counts are never green if the suite did
    not exit with 0, or if its output shows that something is missing. The same arguments give the same bytes.
    """
    log, status = clean(output), ended.status if ended else None
    kind = "junit" if own_xml is not None else detect(log) if fmt == "auto" else fmt
    root, counts, cases = ET.Element("testsuites"), Counter[Outcome](), list[Case]()
    if problem and ended:
        cases = [Case("JUnit file", "error", problem, _tail(log))]
    elif kind == "junit" and (ended or own_xml is not None):
        root, counts, cases = _own(own_xml, log)
    elif kind == "tap":
        cases = [_or_plain(case) if fmt == "auto" and status == 0 else case for case in tap.cases(log)]
    elif kind == "go-json":
        cases, log = gotest.cases(log)
    elif ended and not ended.timed_out:
        cases = [_plain(ended.status, log)]
    bad = counts["failed"] + counts["error"] + sum(case.outcome in ("failed", "error") for case in cases)
    if ended is None:
        cases.append(Case("run", "error", problem, _tail(log)))
    elif ended.timed_out or (status != 0 and (problem or not bad)):
        cases.append(Case("exit status", "error", _meaning(ended, duration_s), _tail(log)))
    counts += Counter(case.outcome for case in cases)
    suite = _suite(one_line(name), cases, log, duration_s)
    totals = Counts(counts["passed"], counts["failed"], counts["skipped"], counts["error"])
    trouble = next((one_line(case.message) for case in cases if case.outcome == "error"), "")
    return Report(_document(root, suite, totals), totals, trouble)


def detect(log: str) -> Format:
    """Detect the format of a suite's output by the first line that only one format has.

    A plan and a test point together mean TAP.
    """
    if log.lstrip().startswith(("<?xml", "<testsuite")):
        return "junit"
    seen = set[tap.Kind]()
    for line in log.split("\n"):
        seen |= {kind} if (kind := tap.kind(line)) else set()
        if "sure" in seen or seen >= {"plan", "point"}:
            return "tap"
        if gotest.event(line) is not None:
            return "go-json"
    return "plain"


def _or_plain(case: Case) -> Case:
    """Add a hint to an error case: the output may not be TAP."""
    if case.outcome != "error":
        return case
    return replace(case, message=f'{case.message} (if this is no TAP: format = "plain")')


def _own(data: bytes | None, log: str) -> tuple[ET.Element, Counter[Outcome], list[Case]]:
    """Read the suite's own XML, or make an error case in its place."""
    if data is None and detect(log) == "junit":
        data = log.encode()
    try:
        return own.normalised(data or b"")
    except ValueError as problem:
        case = Case("JUnit file", "error", f"the suite's JUnit XML cannot be used: {problem}")
        return ET.Element("testsuites"), Counter(), [case]


def _plain(status: int, log: str) -> Case:
    """The one test case of a suite that has only an exit status."""
    if status == 0:
        return Case("exit status", "passed")
    return Case("exit status", "failed", f"exited with status {status}", _tail(log))


def _meaning(ended: Ended, duration_s: float) -> str:
    """Explain a status other than 0 of a suite in which no test failed."""
    status = ended.status
    if ended.timed_out:
        return f"timed out after {seconds(duration_s):g} s"
    names = {128 + number: number.name for number in signal.Signals}
    how = f"{status}, which is death by {names[status]}" if status in names else str(status)
    return f"exited with status {how}, although no test failed"


def _tail(log: str, lines: int = 30) -> str:
    """The end of the output, which usually has the reason of a failure."""
    return "\n".join(log.rstrip("\n").split("\n")[-lines:])


def _document(root: ET.Element, suite: ET.Element, totals: Counts) -> bytes:
    """Add `suite` to the <testsuites> `root`, whose own cases have been counted, and write it."""
    root.append(suite)
    root.set("name", suite.attrib["name"])
    root.set("time", suite.attrib["time"])
    own.set_counts(root, totals.total, totals.failed, totals.errors, totals.skipped)
    ET.indent(root)
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _suite(name: str, cases: Sequence[Case], log: str, duration_s: float) -> ET.Element:
    """Make the <testsuite> of these cases, with the output."""
    counts = Counter(case.outcome for case in cases)
    suite = ET.Element("testsuite", name=name)
    own.set_counts(suite, len(cases), counts["failed"], counts["error"], counts["skipped"])
    suite.set("time", str(seconds(duration_s)))
    for case in cases:
        _add(suite, case)
    ET.SubElement(suite, "system-out").text = shorten(log, LOG_LIMIT)
    return suite


def _add(suite: ET.Element, case: Case) -> None:
    """Add a <testcase>."""
    group = one_line(case.group) or suite.attrib["name"]
    element = ET.SubElement(suite, "testcase", name=one_line(case.name) or "unnamed", classname=group)
    if case.time_s is not None:
        element.set("time", str(seconds(case.time_s)))
    if case.outcome != "passed":
        result = ET.SubElement(element, {"failed": "failure"}.get(case.outcome, case.outcome))
        if case.message:
            result.set("message", one_line(case.message))
        result.text = shorten(clean(case.text), TEXT_LIMIT)
