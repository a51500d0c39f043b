"""The tasks of vmtasks: `./doit list` shows them, `./doit help_vars` the variables, config/vm.toml is what to edit."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmtasks.tasks import *  # noqa: F403

TOOLS = Path(sys.executable).parent


def shell_files() -> list[str]:
    """Every file that a POSIX shell runs: by its first line, since most have no ending. Templates: see tests/unit."""
    found = [Path("doit"), *Path("vmtasks").rglob("*.sh"), *Path("phases").rglob("*"), *Path("examples").rglob("*")]
    first = ((path, path.read_bytes()[:32].split(b"\n")[0]) for path in found if path.is_file())
    return sorted(str(path) for path, line in first if line.startswith((b"#!/bin/sh", b"# shellcheck shell=sh")))


CHECKS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "imports": ["lint-imports"],
    "shell": ["shellcheck", "-s", "sh", *shell_files()],
    "unit": ["pytest", "-q", "tests/unit"],
    "vm": ["pytest", "-q", "tests/vm"],
}


def task_check() -> Iterator[dict[str, Any]]:
    """Check vmtasks itself: format, lint, types, import contracts, shell scripts, unit tests, VM tests."""
    yield {"name": None, "doc": "check vmtasks itself: format, lint, types, imports, shell, unit and VM tests"}
    for name, (tool, *words) in CHECKS.items():
        yield {"name": name, "actions": [[str(TOOLS / tool), *words]], "io": {"capture": False}, "verbosity": 2}
