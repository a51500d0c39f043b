"""The JUnit file that a suite wrote -> the same as <testsuites>, with correct counts."""

import math
import re
from collections import Counter
from xml.etree import ElementTree as ET

from vmtasks.suites.junit.case import TEXT_LIMIT, Case, Outcome, clean, shorten

DEPTH_LIMIT = 100
"""Nesting of elements in a suite's own file. Real ones have fewer than ten."""


def normalised(data: bytes) -> tuple[ET.Element, Counter[Outcome], list[Case]]:
    """Read a JUnit file: <testsuites> with corrected counts, these counts, an error case if it contradicts itself.

    ValueError if it is not well-formed, or no JUnit file: malformed XML is not repaired.
    """
    if not data.strip():
        raise ValueError("there is none")
    root = _parse(data)
    for element in root.iter():
        _tidy(element)
    if root.tag not in {"testsuites", "testsuite"}:
        raise ValueError(f"its root is <{shorten(root.tag, 80)}>, not <testsuites> or <testsuite>")
    claimed = _claimed(root)
    if root.tag == "testsuite":
        suite, root = root, ET.Element("testsuites")
        root.append(suite)
    for case in root.findall("testcase"):
        root.remove(case)
        ET.SubElement(root, "testsuite", name="").append(case)
    for suite in root.iter("testsuite"):
        cases = Counter(_outcome(case) for case in suite.iter("testcase"))
        set_counts(suite, cases.total(), cases["failed"], cases["error"], cases["skipped"])
    counts = Counter(_outcome(case) for case in root.iter("testcase"))
    problems = []
    if claimed and not (counts["failed"] or counts["error"]):
        problems = [Case("JUnit file", "error", f"the file counts {claimed} failures, but none of its cases failed")]
    return root, counts, problems


def _parse(data: bytes) -> ET.Element:
    """Parse XML that a test tool wrote. ValueError when it is not well-formed; expat bounds the growth of entities."""
    try:
        root = ET.fromstring(data)  # noqa: S314 - see above
    except (ET.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"it is not well-formed: {error}") from error
    level, depth = [root], 0
    while level:
        level, depth = [child for element in level for child in element], depth + 1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"its elements are nested more than {DEPTH_LIMIT} deep")
    return root


def _tidy(element: ET.Element) -> None:
    """Remove namespaces, control characters and times that are not a number; shorten long texts."""
    element.tag = element.tag.rpartition("}")[2]
    element.text, element.tail = shorten(clean(element.text or ""), TEXT_LIMIT), clean(element.tail or "") or None
    for key, value in element.attrib.items():
        element.set(key, clean(value))
    if "time" in element.attrib and not _is_number(element.attrib["time"]):
        del element.attrib["time"]


def _outcome(case: ET.Element) -> Outcome:
    """How a <testcase> ended. One that was not run (disabled, in GoogleTest) is marked as skipped."""
    tags = {child.tag for child in case}
    if "error" in tags or "failure" in tags:
        return "error" if "error" in tags else "failed"
    if "skipped" not in tags and case.get("status") in {"notrun", "disabled"}:
        case.append(case.makeelement("skipped", {}))
        return "skipped"
    return "skipped" if "skipped" in tags else "passed"


def _claimed(root: ET.Element) -> int:
    """Add up the failures and errors in the outermost counts: a collection error may have no case."""

    def stated(element: ET.Element) -> int:
        numbers = (element.get(key, "") for key in ("failures", "errors"))
        return sum(int(number) for number in numbers if re.fullmatch(r"[0-9]{1,9}", number))

    return stated(root) or sum(stated(child) for child in root.findall("testsuite"))


def set_counts(suite: ET.Element, tests: int, failures: int, errors: int, skipped: int) -> None:
    """Set the four attributes that count a suite's cases."""
    for key, number in {"tests": tests, "failures": failures, "errors": errors, "skipped": skipped}.items():
        suite.set(key, str(number))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False
