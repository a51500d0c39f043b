"""The task that verifies a guest on real media and writes a report."""

from typing import Any

from vmtasks.host import progress
from vmtasks.tasks.context import CONFIG, action
from vmtasks.tasks.images import UNVERIFIED_PARAM


def task_verify_guest() -> dict[str, Any]:
    """Install the guest anew in a folder of its own, try everything, and write .vm/report.md to send back.

    It takes as long as a whole installation and needs the installer's download. Every stage is timed. What the guest's
    [[questions]] ask is answered from the consoles, in the running machine, or by the host. Machines, images and
    results of the project are left alone. The report is written in any case.

    Exit status: 0 all stages passed; 1 one failed.
    Example: doit verify_guest
    """

    def verify(allow_unverified: bool) -> Any:  # noqa: FBT001 - doit passes it by name
        from doit.exceptions import TaskFailed  # noqa: PLC0415

        from vmtasks.verify.verify import Verification  # noqa: PLC0415

        verification = Verification(CONFIG, progress.say)
        failed = verification.run(allow_unverified=allow_unverified).failed
        progress.say(f"report: {verification.report}")
        if failed:
            return TaskFailed(f"{failed[0].name} {failed[0].outcome}: {failed[0].note}\nreport: {verification.report}")
        return None

    return {"actions": [action(verify)], "params": [UNVERIFIED_PARAM], "io": {"capture": False}}
