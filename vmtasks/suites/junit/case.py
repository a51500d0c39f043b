"""One test case, and text made valid for a report."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from vmtasks import printable

Outcome = Literal["passed", "failed", "skipped", "error"]

NAME_LIMIT = 500
"""Characters of a test's name or of a one-line message."""
TEXT_LIMIT = 64 * 1024
"""Characters of the text about one test."""
LOG_LIMIT = 1024 * 1024
"""Characters of a suite's output that are kept in its report; all of it is in the suite's log."""

_FORBIDDEN = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One test case of a report. `group` becomes its class name; if empty, the suite's name does."""

    name: str
    outcome: Outcome
    message: str = ""
    text: str = ""
    group: str = ""
    time_s: float | None = None


def clean(text: str) -> str:
    """Make `text` fit for XML and for a terminal that shows it: LF line ends, U+FFFD for stray bytes."""
    return _FORBIDDEN.sub("", printable.text(text.replace("\r\n", "\n").replace("\r", "\n")))


def shorten(text: str, limit: int) -> str:
    """Take out the middle of `text` when it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def one_line(text: str) -> str:
    """Make `text` fit for an attribute: one line, not too long."""
    return " ".join(shorten(clean(text), NAME_LIMIT).split())


def seconds(value: float) -> float:
    """Round a duration to milliseconds; a negative or infinite value or NaN gives 0."""
    return round(value, 3) if math.isfinite(value) and value > 0 else 0.0
