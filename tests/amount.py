"""How much a run tries: a sample of the cases, or all of them with --exhaustive."""

from collections.abc import Sequence

import pytest


def cases(*always: object, more: Sequence[object]) -> list[object]:
    """Values for `parametrize`: `always` in every run, `more` only in an exhaustive one. A tuple is one row."""
    rows = (value if isinstance(value, tuple) else (value,) for value in more)
    return [*always, *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in rows)]


def exhaustive(config: pytest.Config) -> bool:
    """Whether every case is wanted, however long that takes."""
    return bool(config.getoption("--exhaustive"))
