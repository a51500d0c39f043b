"""Unattended, phase-cached OS installs in QEMU, and remote test suites that rerun only when stale.

    from vmtasks import Machine, Project, temp_machine, CommandResult, VmTasksError

See docs/python.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmtasks.errors import VmTasksError
    from vmtasks.guest.command import CommandResult
    from vmtasks.machines.machine import Machine
    from vmtasks.machines.project import Project
    from vmtasks.machines.temporary import temp_machine

__all__ = ["CommandResult", "Machine", "Project", "VmTasksError", "temp_machine"]
__version__ = "0.1.0"

_MODULES = {
    "CommandResult": "vmtasks.guest.command",
    "Machine": "vmtasks.machines.machine",
    "Project": "vmtasks.machines.project",
    "VmTasksError": "vmtasks.errors",
    "temp_machine": "vmtasks.machines.temporary",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import vmtasks` stays cheap."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
