"""The doit tasks, which a project's dodo.py imports. They hold no logic: they call build, session and suites."""

from vmtasks.tasks.context import CONFIG, interrupt_on_signals
from vmtasks.tasks.images import (
    task_auto_install,
    task_clean_phases,
    task_fetch,
    task_phase,
    task_phase_iso,
    task_render,
)
from vmtasks.tasks.machines import (
    task_check_prereqs,
    task_destroy,
    task_help_vars,
    task_install,
    task_restore,
    task_snapshot,
    task_ssh,
    task_start,
    task_status,
    task_stop,
)
from vmtasks.tasks.reporter import Reporter
from vmtasks.tasks.testing import task_build, task_quick, task_sync, task_test, task_test_all

__all__ = [
    "CONFIG",
    "DOIT_CONFIG",
    "task_auto_install",
    "task_build",
    "task_check_prereqs",
    "task_clean_phases",
    "task_destroy",
    "task_fetch",
    "task_help_vars",
    "task_install",
    "task_phase",
    "task_phase_iso",
    "task_quick",
    "task_render",
    "task_restore",
    "task_snapshot",
    "task_ssh",
    "task_start",
    "task_status",
    "task_stop",
    "task_sync",
    "task_test",
    "task_test_all",
]

CONFIG.vm_dir.mkdir(parents=True, exist_ok=True)
interrupt_on_signals()

DOIT_CONFIG = {
    "backend": "sqlite3",
    "default_tasks": ["quick"],
    "dep_file": str(CONFIG.vm_dir / "doit.sqlite3"),
    "reporter": Reporter,
    "verbosity": 2,
}
