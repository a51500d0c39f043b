"""The recorded commands of a phase: read from its console, and compared with what stands in golden/."""

import difflib
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vmtasks.printable import Cleaner
from vmtasks.qemu.console import parse_sentinel

CALL = re.compile(r":: \[(\d+)\] (.*)")
FAILED = re.compile(r"(.*) \(made to fail with status (\d+)\)")
FINDING = re.compile(r"STANDIN: .*")


@dataclass(frozen=True)
class Call:
    """A command that the phase script ran: its step, its words, and how often these words had come by then."""

    step: str
    line: str
    occurrence: int


@dataclass(frozen=True)
class Transcript:
    """What a console says of one boot."""

    calls: tuple[Call, ...]
    made_to_fail: tuple[str, ...]
    findings: tuple[str, ...]
    text: str

    def golden(self, title: str) -> str:
        """As it stands in golden/: one line per command, below its step."""
        lines, step = [f"# {title}: the commands that the script runs, in order."], ""
        for number, call in enumerate(self.calls, 1):
            if call.step != step:
                step = call.step
                lines += ["", f"== {step}"]
            lines.append(f"{number:4} {call.line}")
        return "\n".join(lines) + "\n"


def differences(expected: str, seen: Transcript, title: str) -> list[str]:
    """Where the record differs from the golden one.

    A busy host's emulated serial line drops or doubles a character now and then. So a line counts as seen also if the
    shell's trace, which says it too, has it as it was expected.
    """
    found = seen.golden(title)
    if found.count("\n") != expected.count("\n"):
        return list(difflib.unified_diff(expected.splitlines(), found.splitlines(), "expected", "seen", lineterm=""))
    traced = set(seen.text.splitlines())
    pairs = zip(expected.splitlines(), found.splitlines(), strict=True)
    return [f"{now!r} in place of {line!r}" for line, now in pairs if line != now and not traced & _trace(line)]


def _trace(line: str) -> set[str]:
    """How the shell's trace may show a line of the golden record."""
    words = line.replace("==", "step", 1) if line.startswith("== ") else " ".join(shlex.split(line)[1:])
    return {f"+ : {words}", f"+ : retry {words}"}


def read(console: Path) -> Transcript:
    """Read a recorded console. Commands of a pipeline run at once: their process ids have the script's order."""
    text = Cleaner().feed(console.read_bytes())
    step, found, failed = "", [], []
    for line in text.splitlines():
        sentinel = parse_sentinel(line)
        if sentinel is not None and sentinel.kind == "step":
            step = sentinel.text
        call = CALL.search(line)
        if call is None:
            continue
        fault = FAILED.fullmatch(call[2])
        if fault is not None:
            failed.append(fault[1])
        found.append((int(call[1]), step, fault[1] if fault else call[2]))
    seen: Counter[str] = Counter()
    calls = []
    for _, where, line in sorted(found, key=lambda each: each[0]):
        seen[line] += 1
        calls.append(Call(where, line, seen[line]))
    return Transcript(tuple(calls), tuple(failed), tuple(FINDING.findall(text)), text)
