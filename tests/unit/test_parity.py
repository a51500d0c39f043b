"""docs/parity.md has each promise once, with what checks it; none is open."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/parity.md").read_text()
ROWS = re.findall(r"^\| ([KBGC])(\d+) \| (.+?) \| (.+) \|$", TEXT, re.MULTILINE)
LAST = {"K": 33, "B": 43, "G": 40, "C": 15}


@pytest.mark.parametrize("letter", [letter for letter in LAST if any(row[0] == letter for row in ROWS)])
def test_each_promise_is_there_once(letter: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(int(number), check) for kind, number, _, check in ROWS if kind == letter]
    assert [number for number, _ in rows] == list(range(1, LAST[letter] + 1))
    tested = [number for number, check in rows if "`test_" in check or "rehearsal" in check]
    still_open = [number for number, check in rows if check.lower().startswith("open")]
    with capsys.disabled():
        print(f" {letter}: {len(rows)} rows, {len(tested)} tested, {len(still_open)} open", end="")  # noqa: T201
    assert still_open == []
    assert len(tested) > 0.9 * len(rows)


def test_keystone_and_bcvk_are_there() -> None:
    assert {kind for kind, *_ in ROWS} >= {"K", "B"}
