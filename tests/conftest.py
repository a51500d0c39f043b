"""What takes many minutes is left out of a run, unless it is asked for; and which files run in one worker."""

import re
from typing import Any

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


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, as with `--dist loadfile`; all files that share the machine of `remote_guest` are one."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - only where there are workers

    class ByMachine(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return re.sub(r"test_remote\w*\.py$", "test_remote.py", super()._split_scope(nodeid))

    return ByMachine(config, log) if config.getoption("dist") == "loadfile" else None
