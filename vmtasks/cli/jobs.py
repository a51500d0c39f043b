"""`vmtasks jobs | attach | cancel`: commands in a machine that outlive the connection and this process."""

import shlex
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from vmtasks.cli import complete
from vmtasks.cli.common import AsJson, Name, PassThrough, app, find_machine, show, table
from vmtasks.guest.jobview import JobView
from vmtasks.host import progress
from vmtasks.machines import health, life
from vmtasks.machines.sessions import recorded_session

FOREVER_S = 14 * 86400.0
"""Below 24 days, the longest timeout of poll(2)."""

Job = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="The job's id, or its first characters.", autocompletion=complete.jobs, show_default=False
    ),
]


@app.command(rich_help_panel="Jobs")
def jobs(
    name: Name,
    clear: Annotated[bool, typer.Option("--clear", help="Remove finished jobs with their output.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a machine; `vmtasks exec --detach` starts one."""
    with find_machine(name) as machine:
        views = machine.jobs.list()
        if clear:
            for view in views:
                if view.state not in ("starting", "running"):
                    machine.jobs.remove(view.job)
                    progress.say(f"job {view.job}: removed")
            return
    if as_json:
        show([asdict(view) for view in views])
        return
    rows = []
    for view in views:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.started)) if view.started else ""
        status = "" if view.status is None else str(view.status)
        rows.append((view.job, view.state, status, began, str(view.size), view.title))
    table(("JOB", "STATE", "STATUS", "STARTED", "BYTES", "COMMAND"), rows)


@app.command(cls=PassThrough, rich_help_panel="Jobs")
def attach(name: Name, which: Job) -> None:
    """Print a job's output from the beginning until it ends; exits with its status. Ctrl-C leaves it running."""
    with (
        find_machine(name) as machine,
        health.warn_when_stuck(machine.place),
        recorded_session(machine.place, "attach", which) as outcome,
    ):
        end = machine.jobs.follow(which, timeout_s=FOREVER_S, on_data=_print_data, keep=False)
        outcome.status = end.status
    raise typer.Exit(end.status)


@app.command(rich_help_panel="Jobs")
def cancel(name: Name, which: Job) -> None:
    """End a job and all its processes: SIGTERM, then SIGKILL."""
    with find_machine(name) as machine:
        view = machine.jobs.cancel(which)
    progress.say(f"job {view.job}: {describe_end(view)}")


def start_job(name: str, words: list[str], *, cwd: str, env: dict[str, str], user: str) -> str:
    """Start a program as a job; returns the job's id."""
    with find_machine(name) as machine:
        life.wait_ready(machine.place)
        with recorded_session(machine.place, "exec", shlex.join(words), user, goes_on=True) as outcome:
            job = machine.jobs.start(words, cwd=cwd, env=env, user=user)
            outcome.status = 0
    return job


def describe_end(view: JobView) -> str:
    """How a job has ended, or that it has not."""
    unknown = "its exit status is not known"
    if view.state == "rebooted":
        return f"ended by a reboot of the guest; {unknown}"
    if view.state == "lost":
        return f"ended, because its supervisor in the guest was killed; {unknown}"
    if view.state == "damaged":
        return f"ended, but its status in the guest cannot be read; {unknown}"
    if view.status is None:
        return f"still {view.state}"
    return f"ended by signal {view.signal}, status {view.status}" if view.signal else f"ended, status {view.status}"


def _print_data(data: bytes, stream: str) -> None:
    sink = (sys.stderr if stream == "stderr" else sys.stdout).buffer
    sink.write(data)
    sink.flush()
