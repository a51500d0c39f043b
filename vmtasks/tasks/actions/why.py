"""The action of `doit why`: print the forecast as text, JSON or a graph."""

import json
import sys

import msgspec

from vmtasks import printable
from vmtasks.errors import ConfigError
from vmtasks.host.progress import seconds
from vmtasks.suites.forecast import Forecast, Step
from vmtasks.tasks.context import CONFIG


def why(*, tasks: list[str], as_json: bool, as_dot: bool, verbose: bool) -> None:
    """Print what would run for `tasks`, or for all. ConfigError for two formats."""
    if as_json and as_dot:
        raise ConfigError("why: --json and --dot exclude each other")
    steps = Forecast(CONFIG).steps(tasks)
    text = _json(steps) if as_json else _dot(steps) if as_dot else _text(steps, diffs=verbose)
    sys.stdout.write(text + "\n")


def _text(steps: list[Step], *, diffs: bool = False) -> str:
    lines = []
    for step in steps:
        if step.runs == "no":
            continue
        about = f"; about {seconds(step.cost_s)}" if step.cost_s else ""
        how = "is taken from the store" if step.from_store else "will run" if step.runs == "yes" else "may run"
        lines.append(f"{step.name} {how}: {'; '.join(step.causes)}{about}")
        if diffs:
            lines += [f"    {line}" for text in step.diffs.values() for line in text.splitlines()]
    fresh = [step.name for step in steps if step.runs == "no"]
    if fresh:
        lines.append(f"up to date: {', '.join(fresh)}")
    cost_s = sum(step.cost_s or 0 for step in steps)
    if cost_s:
        lines.append(f"in all about {seconds(cost_s)}, as far as it is known")
    return printable.text("\n".join(lines))


def _json(steps: list[Step]) -> str:
    cost_s = sum(step.cost_s or 0 for step in steps)
    return json.dumps({"steps": [msgspec.to_builtins(step) for step in steps], "cost_s": cost_s}, indent=2)


def _dot(steps: list[Step]) -> str:
    style = {"no": "color=gray", "yes": "style=bold", "unknown": "style=dashed"}
    names = {step.name for step in steps}
    lines = ["digraph plan {", "  rankdir=LR;", "  node [shape=box];"]
    for step in steps:
        label = "\n".join([step.name, *step.causes])
        lines.append(f"  {json.dumps(step.name)} [label={json.dumps(label)}, {style[step.runs]}];")
        lines += [f"  {json.dumps(name)} -> {json.dumps(step.name)};" for name in step.after if name in names]
    return "\n".join([*lines, "}"])
