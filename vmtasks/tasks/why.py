"""`doit why`: what would run and why, before anything runs."""

from typing import Any

from vmtasks.tasks.context import action


def task_why() -> dict[str, Any]:
    """Say what would run and why, what the store has, and how long it took last time. Writes nothing.

    `doit why` covers the whole graph; `doit why quick` or `doit why phase:3 test:unit` what these tasks need. Each step
    that would run is shown with what was edited, and for a text with the first line that differs. `-v` shows the whole
    diff. `--json` and `--dot` are for programs.

    Exit status: 0 whether anything would run or not; 2 no such step, or wrong configuration.
    Example: doit why -v phase:3
    """
    flag = {"type": bool, "default": False}
    return {
        "actions": [action("vmtasks.tasks.actions.why:why")],
        "pos_arg": "tasks",
        "params": [
            {"name": "as_json", "long": "json", **flag, "help": "print JSON"},
            {"name": "as_dot", "long": "dot", **flag, "help": "print the graph for Graphviz"},
            {"name": "verbose", "long": "verbose", "short": "v", **flag, "help": "show how texts changed"},
        ],
        "io": {"capture": False},
    }
