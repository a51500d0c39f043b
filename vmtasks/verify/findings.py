"""PURE: the findings of a verification -> a report in Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from vmtasks.config.tables import Question

EXCERPT = 25
"""Lines of a console's beginning and of its end."""

LONGEST = 400
"""Lines of one answer; a package list or a start-up script has fewer."""

OBSERVED = re.compile(r"observed ([^:]+): ?(.*)")


@dataclass(frozen=True)
class Stage:
    """A part of the verification: its name, its outcome, seconds, and a note."""

    name: str
    outcome: Literal["passed", "failed", "not reached"]
    took_s: float = 0.0
    note: str = ""


@dataclass
class Findings:
    """The findings so far. `host` and `guest` are facts by name; `consoles` whole lines by the name of a boot."""

    guest: dict[str, str] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    consoles: dict[str, list[str]] = field(default_factory=dict)

    @property
    def failed(self) -> list[Stage]:
        """What did not pass."""
        return [stage for stage in self.stages if stage.outcome != "passed"]


def observed(lines: Iterable[str]) -> dict[str, list[str]]:
    """What phase scripts printed with `observe`, by name, in order."""
    found: dict[str, list[str]] = {}
    for line in lines:
        match = OBSERVED.fullmatch(line.rstrip())
        if match:
            found.setdefault(match[1], []).append(match[2])
    return found


def answer(question: Question, answers: Mapping[str, Sequence[str]], seen: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines that answer `question`; empty when nothing does. `answers` is by question, `seen` by observed name."""
    if not question.observed:
        return list(answers.get(question.asks, ()))
    lines: list[str] = []
    for name, said in seen.items():
        if fnmatchcase(name, question.observed):
            lines += [f"[{name}]", *said]
    return lines


def markdown(title: str, findings: Findings, questions: Sequence[Question]) -> str:
    """The report. It names no host, user or folder that the guest has not printed."""
    seen = observed(line for lines in findings.consoles.values() for line in lines)
    replies = [(question, answer(question, findings.answers, seen)) for question in questions]
    open_points = sum(not lines for _, lines in replies)
    failed = findings.failed
    verdict = "all stages passed" if not failed else f"{failed[0].name}: {failed[0].outcome}"
    parts = [f"# {title}", f"{verdict}; {len(replies) - open_points} of {len(replies)} questions answered."]
    parts += [
        "## Guest",
        _table(findings.guest),
        "## Host",
        _table(findings.host),
        "## Stages",
        _stages(findings.stages),
    ]
    parts.append("## Questions")
    for number, (question, lines) in enumerate(replies, 1):
        parts += [f"### {number}. {question.asks}", _block(lines) if lines else "Not answered: see the stages above."]
    asked = [question.observed for question in questions if question.observed]
    rest = {name: said for name, said in seen.items() if not any(fnmatchcase(name, glob) for glob in asked)}
    if rest:
        parts.append("## Also observed")
        for name, said in rest.items():
            parts += [f"### {name}", _block(said)]
    parts.append("## Consoles")
    for name, lines in findings.consoles.items():
        parts += [f"### {name}: {len(lines)} lines", _block(_excerpt(lines))]
    return "\n\n".join(parts) + "\n"


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _stages(stages: Sequence[Stage]) -> str:
    rows = [f"| {s.name} | {s.outcome} | {s.took_s:.1f} | {_cell(s.note)} |" for s in stages]
    return "\n".join(["| stage | outcome | seconds | |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _block(lines: Sequence[str]) -> str:
    """The lines as they are, in a fence that none of them can close."""
    shown = list(lines[:LONGEST])
    if len(lines) > LONGEST:
        shown.append(f"... {len(lines) - LONGEST} more lines")
    fence = "`" * max(3, 1 + max((len(run) for line in shown for run in re.findall(r"`+", line)), default=0))
    return "\n".join([f"{fence}text", *shown, fence])


def _excerpt(lines: Sequence[str]) -> list[str]:
    if len(lines) <= 2 * EXCERPT:
        return list(lines)
    return [*lines[:EXCERPT], f"... {len(lines) - 2 * EXCERPT} lines ...", *lines[-EXCERPT:]]
