"""`doit info TASK` in words: doit's own prints what Python shows of our objects."""

from collections.abc import Iterable
from typing import Any

from doit.cmd_info import Info
from doit.exceptions import InvalidCommand

REASONS = {
    "missing_target": "there is no",
    "changed_file_dep": "changed:",
    "missing_file_dep": "missing:",
    "removed_file_dep": "no longer needed:",
    "added_file_dep": "needed since:",
}


def install() -> None:
    """Have doit's command print this. It reads its plugins before it reads dodo.py, so that there is no other way."""
    Info._execute = _execute  # noqa: SLF001


def _execute(self: Any, pos_args: list[str], *, hide_status: bool = False) -> int:
    """As doit's own; returns 0 for up to date, else 1."""
    tasks = {task.name: task for task in self.task_list}
    if len(pos_args) != 1 or pos_args[0] not in tasks:
        raise InvalidCommand(f"info: name one task; `{self.bin_name} list --all` shows them")
    task = tasks[pos_args[0]]
    out = [task.name, "", str(task.doc or "").strip(), ""]
    stale = False
    if not hide_status:
        status = self.dep_manager.get_status(task, tasks, get_log=True)
        stale = status.status != "up-to-date"
        out += [f"status: {'to be done' if stale else 'up to date'}", *(f"  {why}" for why in _why(status.reasons))]
    out += _listed("after", [*task.task_dep, *task.setup_tasks])
    out += _listed("reads", task.file_dep)
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
    for name, sentence in REASONS.items():
        why += [f"{sentence} {entry}" for entry in sorted(reasons.get(name) or ())]
    return why or ["what it is made from has changed"]


def _listed(title: str, items: Iterable[str]) -> list[str]:
    shown = sorted(items)
    return ["", f"{title}:", *(f"  {item}" for item in shown)] if shown else []
