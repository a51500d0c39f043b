"""The task that verifies a guest on real media and writes a report."""

from typing import Any

from vmtasks.tasks.context import action
from vmtasks.tasks.images import UNVERIFIED_PARAM


def task_verify_guest() -> dict[str, Any]:
    """Install the guest again in a separate folder, test everything, and write .vm/report.md to send back.

    Takes as long as a full installation and downloads the installer. Every stage is timed. Answers to the guest's
    [[questions]] come from the consoles, the running machine, or the host. Leaves the project's machines, images and
    results alone. Writes the report even when a stage fails.

    Exit status: 0 all stages passed; 1 one failed.
    Example: doit verify_guest
    """
    return {
        "actions": [action("vmtasks.tasks.actions.verifying:verify")],
        "params": [UNVERIFIED_PARAM],
        "io": {"capture": False},
    }
