"""`doit info TASK` in words, where doit prints Python objects; `doit help TASK` with all of a docstring."""

from collections.abc import Iterable
from typing import Any

from doit.cmd_help import Help
from doit.cmd_info import Info
from doit.exceptions import InvalidCommand

TEXT = "text"
"""Key of a task's whole docstring in its `meta`: doit keeps only the first line."""
DOITS_HELP = Help._execute  # noqa: SLF001


def install() -> None:
    """Replace what doit's commands print. doit reads its plugins before it reads dodo.py, so that no plugin can."""
    Info._execute = _execute  # noqa: SLF001
    Help._execute = _explain  # noqa: SLF001


def _explain(self: Any, pos_args: list[str]) -> bool:
    """Give doit's help the whole docstring of each task."""
    for task in self.task_list:
        task.doc = _text(task)
    return bool(DOITS_HELP(self, pos_args))


def _text(task: Any) -> str:
    return str((task.meta or {}).get(TEXT) or task.doc or "").strip()


def _execute(self: Any, pos_args: list[str], *, hide_status: bool = False) -> int:
    """As doit's own; returns 0 for up to date, else 1."""
    tasks = {task.name: task for task in self.task_list}
    if len(pos_args) != 1 or pos_args[0] not in tasks:
        raise InvalidCommand(f"info: name one task; `{self.bin_name} list --all` shows them")
    task = tasks[pos_args[0]]
    out = [task.name, "", _text(task), ""]
    stale = False
    if not hide_status:
        status = self.dep_manager.get_status(task, tasks, get_log=True)
        stale = status.status != "up-to-date"
        out += [f"status: {'to be done' if stale else 'up to date'}", *(f"  {why}" for why in _why(status.reasons))]
    out += _listed("after", [*task.task_dep, *task.setup_tasks])
    out += _listed("reads", (task.meta or {}).get("reads", ()))
    out += _listed("leaves", task.targets)
    out += _listed("options", [f"--{each.get('long') or each['name']}: {each.get('help', '')}" for each in task.params])
    self.outstream.write("\n".join(out) + "\n")
    return int(stale)


def _why(reasons: Any) -> list[str]:
    if not reasons:
        return []
    why = ["it is always carried out"] if reasons.get("has_no_dependencies") else []
    said = [repr(check) for check, _, _ in reasons.get("uptodate_false", ())]
    why += [text for text in said if not text.startswith("<")]
    why += [f"there is no {target}" for target in sorted(reasons.get("missing_target") or ()) if not said]
    return why or ["what it is made from has changed"]


def _listed(title: str, items: Iterable[str]) -> list[str]:
    shown = sorted(items)
    return ["", f"{title}:", *(f"  {item}" for item in shown)] if shown else []
