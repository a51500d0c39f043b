"""`doit info TASK` in words, where doit prints Python objects, and `doit help TASK` with the whole docstring."""

from collections.abc import Iterable
from typing import Any

from doit.cmd_help import Help
from doit.cmd_info import Info
from doit.exceptions import InvalidCommand

TEXT = "text"
"""Key of a task's whole docstring in its `meta`: doit keeps only the first line."""
DOIT_HELP = Help._execute  # noqa: SLF001


def install() -> None:
    """Patch doit's commands. A plugin cannot: doit loads plugins before dodo.py."""
    Info._execute = _info  # noqa: SLF001
    Help._execute = _help  # noqa: SLF001


def _help(self: Any, pos_args: list[str]) -> bool:
    """Run doit's help with whole docstrings."""
    for task in self.task_list:
        task.doc = _text(task)
    return bool(DOIT_HELP(self, pos_args))


def _text(task: Any) -> str:
    return str((task.meta or {}).get(TEXT) or task.doc or "").strip()


def _info(self: Any, pos_args: list[str], *, hide_status: bool = False) -> int:
    """Print a task; returns 0 if it is up to date, else 1, as doit does."""
    tasks = {task.name: task for task in self.task_list}
    if len(pos_args) != 1 or pos_args[0] not in tasks:
        raise InvalidCommand(f"info: name one task; `{self.bin_name} list --all` shows them")
    task = tasks[pos_args[0]]
    out = [task.name, "", _text(task), ""]
    stale = False
    if not hide_status:
        status = self.dep_manager.get_status(task, tasks, get_log=True)
        stale = status.status != "up-to-date"
        out += [f"status: {'stale' if stale else 'up to date'}", *(f"  {why}" for why in _why(status.reasons))]
    out += _listed("after", [*task.task_dep, *task.setup_tasks])
    out += _listed("reads", (task.meta or {}).get("reads", ()))
    out += _listed("leaves", task.targets)
    out += _listed("options", [f"--{each.get('long') or each['name']}: {each.get('help', '')}" for each in task.params])
    self.outstream.write("\n".join(out) + "\n")
    return int(stale)


def _why(reasons: Any) -> list[str]:
    if not reasons:
        return []
    why = ["it always runs"] if reasons.get("has_no_dependencies") else []
    texts = [repr(check) for check, _, _ in reasons.get("uptodate_false", ())]
    why += [text for text in texts if not text.startswith("<")]
    why += [f"there is no {target}" for target in sorted(reasons.get("missing_target") or ()) if not texts]
    return why or ["its inputs have changed"]


def _listed(title: str, items: Iterable[str]) -> list[str]:
    shown = sorted(items)
    return ["", f"{title}:", *(f"  {item}" for item in shown)] if shown else []
