"""The action that verifies a guest."""

from doit.exceptions import TaskFailed

from vmtasks.host import progress
from vmtasks.tasks.context import CONFIG
from vmtasks.verify.verify import Verification


def verify(*, allow_unverified: bool) -> TaskFailed | None:
    """Run all stages and print where the report is."""
    verification = Verification(CONFIG, progress.say)
    failed = verification.run(allow_unverified=allow_unverified).failed
    progress.say(f"report: {verification.report}")
    if failed:
        return TaskFailed(f"{failed[0].name} {failed[0].outcome}: {failed[0].note}\nreport: {verification.report}")
    return None
