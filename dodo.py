"""The tasks of vmtasks: `./doit list` shows them, `./doit help_vars` the variables, config/vm.toml is what to edit."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doit.exceptions import TaskFailed

from vmtasks.tasks import *  # noqa: F403

TOOLS = Path(sys.executable).parent


def shell_files() -> list[str]:
    """Every file that a POSIX shell runs: by its first line, since most have no ending. Templates: see tests/unit."""
    folders = ("examples", "phases", "tests/rehearsal")
    found = [Path("doit"), *Path("vmtasks").rglob("*.sh"), *(p for f in folders for p in Path(f).rglob("*"))]
    first = (
        (path, path.read_bytes()[:32].split(b"\n")[0]) for path in found if path.is_file() and path.suffix != ".j2"
    )
    starts = (b"#!/bin/sh", b"# shellcheck shell=sh", b"#!/usr/libexec/standin/bin/dash")
    return sorted(str(path) for path, line in first if line.startswith(starts))


# By file: what the tests of a file share, such as a running machine, is made once. A guest keeps a CPU busy; most unit
# tests wait for something.
BY_FILE = ["--dist", "loadfile", "--no-loadscope-reorder"]
GUESTS = [*BY_FILE, "-n", "auto", "--maxprocesses", "4"]
CHECKS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "imports": ["lint-imports"],
    "shell": ["shellcheck", "-s", "sh"],
    "unit": ["pytest", "-q", *BY_FILE, "-n", "4", "tests/unit"],
    "vm": ["pytest", "-q", *GUESTS, "tests/vm"],
}
EXHAUSTIVE = ["pytest", "-q", *GUESTS, "tests", "--exhaustive", "-m", "exhaustive or sampled"]


STARTS = {
    "lint-imports": [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    "shellcheck": [str(TOOLS / "shellcheck")],
}
"""Tools that are no modules to be run by Python."""


def check(name: str) -> TaskFailed | None:
    """Run one check with its output here."""
    tool, *words = {**CHECKS, "exhaustive": EXHAUSTIVE}[name]
    files = shell_files() if name == "shell" else []
    sys.stdout.write(f"check {name}: {shlex.join([tool, *words])}\n")
    sys.stdout.flush()
    # Of the scripts in .venv/bin those that pip has written break in a folder with a quotation mark in its name.
    argv = STARTS.get(tool, [sys.executable, "-m", tool])
    status = subprocess.run([*argv, *words, *files], stdin=subprocess.DEVNULL, check=False).returncode
    return TaskFailed(f"{tool} exited with {status}") if status else None


def task_check() -> Iterator[dict[str, Any]]:
    """Check vmtasks itself: format, lint, types, import contracts, shell scripts, unit tests, VM tests."""
    for name, words in CHECKS.items():
        yield {"name": name, "doc": " ".join(words), "actions": [(check, [name])], "io": {"capture": False}}


def task_check_exhaustive() -> dict[str, Any]:
    """Check what takes long: more kills, more failures, every way to install. An hour; `check` runs all else."""
    return {"basename": "check:exhaustive", "actions": [(check, ["exhaustive"])], "io": {"capture": False}}
