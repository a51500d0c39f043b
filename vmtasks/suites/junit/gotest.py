"""The events of `go test -json` (test2json), one in a line -> test cases."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vmtasks.suites.junit.case import Case, Outcome, clean

_BUILD_ACTIONS = ("build-output", "build-fail")
_OUTCOMES: dict[str, Outcome] = {"pass": "passed", "bench": "passed", "fail": "failed", "skip": "skipped"}
_ACTIONS = {*_BUILD_ACTIONS, *_OUTCOMES, "artifacts", "attr", "cont", "output", "pause", "run", "start"}
_BUILD_FAILED = re.compile(r"FAIL\s+(?P<package>\S+) \[(?P<what>build|setup) failed\]")
_LONGEST_S = 1e9


def event(line: str) -> dict[str, Any] | None:
    """Read the test2json event in `line`; None when it is something else."""
    if not line.startswith("{") or '"Action"' not in line:
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    action = found.get("Action")
    return found if isinstance(action, str) and action in _ACTIONS else None


def cases(log: str) -> tuple[list[Case], str]:
    """Read the events in `log`: the test cases, and the output that the events carry."""
    reader = _Reader()
    for line in log.split("\n"):
        reader.feed(line)
    found = list(reader.cases())
    if not found and not reader.runs:
        return [Case("go test", "error", "no events of `go test -json` in the output")], log
    return found, "".join(reader.log)


@dataclass
class _Run:
    """One run of a test, or of a package when `test` is empty."""

    package: str
    test: str
    outcome: Outcome | None = None
    time_s: float | None = None
    failed_build: str = ""
    output: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return self.outcome in (None, "failed")

    def case(self) -> Case:
        text = "".join(self.output)
        message = {None: "did not finish", "failed": "failed", "skipped": _reason(text)}.get(self.outcome, "")
        return Case(self.test, self.outcome or "error", message, text if self.is_bad else "", self.package, self.time_s)


def _reason(text: str) -> str:
    """The message of a skipped test: its last line that the test runner did not add."""
    said = [line.strip() for line in text.split("\n") if line.strip()]
    return next((line for line in reversed(said) if not line.startswith(("===", "---"))), "")


class _Reader:
    """Events in, runs out."""

    def __init__(self) -> None:
        self.runs: list[_Run] = []
        self.latest: dict[tuple[str, str], _Run] = {}
        self.builds: dict[str, list[str]] = {}
        self.loose: list[str] = []
        self.log: list[str] = []

    def feed(self, line: str) -> None:
        """Take in one line."""
        found = event(line)
        if found is None:
            self.loose.append(line)
            self.log.append(line + "\n" if line else "")
            return
        action, output = found["Action"], clean(_text(found, "Output"))
        self.log.append(output)
        if action in _BUILD_ACTIONS:
            self.builds.setdefault(_text(found, "ImportPath"), []).append(output)
            return
        package, test = _text(found, "Package"), _text(found, "Test")
        self._run(package, "", again=False)
        run = self._run(package, test, again=action == "run")
        run.output.append(output)
        if action in _OUTCOMES:
            run.outcome, run.time_s = _OUTCOMES[action], _elapsed(found)
            run.failed_build = _text(found, "FailedBuild")

    def _run(self, package: str, test: str, *, again: bool) -> _Run:
        run = self.latest.get((package, test))
        if run is None or (again and run.outcome is not None):
            run = _Run(package, test)
            self.runs.append(run)
            self.latest[package, test] = run
        return run

    def cases(self) -> Iterator[Case]:
        """Yield the tests in the order in which they began, then errors outside of any test."""
        yield from (run.case() for run in self.runs if run.test)
        explained = {run.package for run in self.runs if run.test and run.is_bad}
        packages = [run for run in self.runs if not run.test]
        yield from (self._package(run) for run in packages if run.is_bad and run.package not in explained)
        known = {run.failed_build for run in packages}
        for path, output in self.builds.items():
            if path not in known:
                yield Case(path or "build", "error", "build failed", "".join(output), path)
        failed = {run.package for run in packages if run.outcome == "failed"}
        for match in map(_BUILD_FAILED.match, self.loose):
            if match and match["package"] not in failed:
                path = match["package"]
                yield Case(path, "error", f"{match['what']} failed", "\n".join(self.loose), path)

    def _package(self, run: _Run) -> Case:
        """Make the error case of a package that failed, or never ended, without a test that explains it."""
        text = "".join([*self.builds.get(run.failed_build, []), *run.output])
        message = "failed outside of its tests"
        if run.outcome is None:
            message = "did not finish"
        elif run.failed_build:
            message = "build failed"
        elif "[build failed]" in text:
            # Before Go 1.24 the compiler's messages stand between the events, without a package.
            message, text = "build failed", "\n".join([*self.loose, text])
        return Case(run.package or "package", "error", message, text, run.package, run.time_s)


def _text(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    return value if isinstance(value, str) else ""


def _elapsed(found: dict[str, Any]) -> float | None:
    """Read the seconds of an event; None if it cannot be a duration, such as a number of 400 digits."""
    value = found.get("Elapsed")
    return float(value) if isinstance(value, int | float) and 0 <= value < _LONGEST_S else None
