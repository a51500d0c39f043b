"""The JUnit file that a suite wrote itself -> the same, with its shape and its counts set right."""

import math
import re
from collections import Counter
from typing import Any

from vmtasks.suites.junit.case import TEXT_LIMIT, Case, Outcome, clean, shorten

DEPTH_LIMIT = 100
"""Nesting of elements in a suite's own file. Real ones have fewer than ten."""

_FORBIDDEN_REFERENCE = re.compile(r"&#(?:x0*(?:[0-8bcef]|1[0-9a-f])|0*(?:[0-8]|1[124-9]|2\d|3[01]));", re.IGNORECASE)
_XML_DECLARATION = re.compile(r"\A\s*<\?xml[^>]*\?>")


def normalised(data: bytes) -> tuple[bytes, Counter[Outcome], list[Case]]:
    """Give a JUnit file as <testsuites> with counts that are true, these counts, and an error case if it is at odds.

    Raises ValueError when it is no JUnit file.
    """
    from xml.etree import ElementTree as ET  # noqa: PLC0415 - start-up time

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
        _set_counts(suite, Counter(_outcome(case) for case in suite.iter("testcase")))
    counts = Counter(_outcome(case) for case in root.iter("testcase"))
    problems = []
    if claimed and not (counts["failed"] or counts["error"]):
        problems = [Case("JUnit file", "error", f"the file counts {claimed} failures, but none of its cases failed")]
    return ET.tostring(root, encoding="utf-8"), counts, problems


def _parse(data: bytes) -> Any:
    """Parse XML that a test tool wrote; control characters and bytes of another encoding are mended."""
    from xml.etree import ElementTree as ET  # noqa: PLC0415 - start-up time

    try:
        root = ET.fromstring(data)  # noqa: S314 - expat bounds the growth of entities
    except (ET.ParseError, ValueError, LookupError):
        text = _FORBIDDEN_REFERENCE.sub("", clean(data.decode("utf-8", "replace")))
        try:
            root = ET.fromstring(_XML_DECLARATION.sub("", text).encode())  # noqa: S314 - as above
        except ET.ParseError as error:
            raise ValueError(f"{error}") from error
    level, depth = [root], 0
    while level:
        level, depth = [child for element in level for child in element], depth + 1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"its elements are nested more than {DEPTH_LIMIT} deep")
    return root


def _tidy(element: Any) -> None:
    """Take away what readers and terminals trip over: namespaces, endless texts, false times, controls."""
    element.tag = element.tag.rpartition("}")[2]
    element.text, element.tail = shorten(clean(element.text or ""), TEXT_LIMIT), clean(element.tail or "") or None
    for key, value in element.attrib.items():
        element.set(key, clean(value))
    if "time" in element.attrib and not _is_number(element.attrib["time"]):
        del element.attrib["time"]


def _outcome(case: Any) -> Outcome:
    """Tell how a <testcase> ended. One that was not run (GoogleTest's way to say disabled) is marked as skipped."""
    tags = {child.tag for child in case}
    if "error" in tags or "failure" in tags:
        return "error" if "error" in tags else "failed"
    if "skipped" not in tags and case.get("status") in {"notrun", "disabled"}:
        case.append(case.makeelement("skipped", {}))
        return "skipped"
    return "skipped" if "skipped" in tags else "passed"


def _claimed(root: Any) -> int:
    """Sum up the failures and errors that the outermost counts state: a collection error may have no case."""

    def stated(element: Any) -> int:
        numbers = (element.get(key, "") for key in ("failures", "errors"))
        return sum(int(number) for number in numbers if re.fullmatch(r"[0-9]{1,9}", number))

    return stated(root) or sum(stated(child) for child in root.findall("testsuite"))


def _set_counts(suite: Any, counts: Counter[Outcome]) -> None:
    numbers = {"tests": counts.total(), "failures": counts["failed"]}
    numbers |= {"errors": counts["error"], "skipped": counts["skipped"]}
    for key, number in numbers.items():
        suite.set(key, str(number))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False
