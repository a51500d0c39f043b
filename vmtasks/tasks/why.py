"""`doit why`: what would run and for which cause, before anything does."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vmtasks import printable
from vmtasks.errors import ConfigError
from vmtasks.host.progress import seconds
from vmtasks.tasks.context import CONFIG, action

if TYPE_CHECKING:
    from vmtasks.suites.forecast import Step

Task = dict[str, Any]


def task_why() -> Task:
    """Say what would run and why, what the store has already, and how long it took the last time. Writes nothing.

    `doit why` looks at the whole graph, `doit why quick` or `doit why phase:3 test:unit` at what these tasks need. Each
    step that would run is told with what was edited, and where that is a text with the first line that is another.
    `-v` shows how the text changed. `--json` and `--dot` are for programs.

    Exit status: 0 it was said, whether anything would run or not; 2 no such step, or wrong configuration.
    Example: doit why -v phase:3
    """

    def why(tasks: list[str], as_json: bool, as_dot: bool, verbose: bool) -> None:  # noqa: FBT001 - doit passes them by name
        from vmtasks.suites.forecast import Forecast  # noqa: PLC0415

        if as_json and as_dot:
            raise ConfigError("why: --json and --dot exclude each other")
        steps = Forecast(CONFIG).steps(tasks)
        form: Callable[[list[Step]], str] = _json if as_json else _dot if as_dot else _text
        sys.stdout.write((_text(steps, diffs=True) if verbose and form is _text else form(steps)) + "\n")

    flag = {"type": bool, "default": False}
    return {
        "actions": [(action(why),)],
        "pos_arg": "tasks",
        "params": [
            {"name": "as_json", "long": "json", **flag, "help": "print JSON"},
            {"name": "as_dot", "long": "dot", **flag, "help": "print the graph for Graphviz"},
            {"name": "verbose", "long": "verbose", "short": "v", **flag, "help": "show how texts changed"},
        ],
        "io": {"capture": False},
    }


def _text(steps: "list[Step]", *, diffs: bool = False) -> str:
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


def _json(steps: "list[Step]") -> str:
    cost_s = sum(step.cost_s or 0 for step in steps)
    return json.dumps({"steps": [msgspec.to_builtins(step) for step in steps], "cost_s": cost_s}, indent=2)


def _dot(steps: "list[Step]") -> str:
    style = {"no": "color=gray", "yes": "style=bold", "unknown": "style=dashed"}
    names = {step.name for step in steps}
    lines = ["digraph plan {", "  rankdir=LR;", "  node [shape=box];"]
    for step in steps:
        label = "\n".join([step.name, *step.causes])
        lines.append(f"  {json.dumps(step.name)} [label={json.dumps(label)}, {style[step.runs]}];")
        lines += [f"  {json.dumps(name)} -> {json.dumps(step.name)};" for name in step.after if name in names]
    return "\n".join([*lines, "}"])
