"""What takes many minutes is left out of a run, unless it is asked for."""

import pytest

from amount import exhaustive


def pytest_addoption(parser: pytest.Parser) -> None:
    """The switch of `./doit check:exhaustive`."""
    parser.addoption("--exhaustive", action="store_true", help="run also what takes many minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked `exhaustive`."""
    if exhaustive(config):
        return
    left = [item for item in items if item.get_closest_marker("exhaustive")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
