"""`vmtasks jobs | attach | cancel`: commands in a machine that outlive the connection and this process."""

import shlex
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from vmtasks.cli import complete
from vmtasks.cli.common import AsJson, Name, Through, app, machine, show, table
from vmtasks.guest.jobview import JobView
from vmtasks.host import progress
from vmtasks.machines import health, life
from vmtasks.machines.sessions import using

FOREVER_S = 14 * 86400.0
"""poll(2) takes no longer waits than 24 days."""

Job = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Its id; the first characters are enough.", autocompletion=complete.jobs, show_default=False
    ),
]


@app.command(rich_help_panel="Jobs")
def jobs(
    name: Name,
    clear: Annotated[bool, typer.Option("--clear", help="Remove those that are over, with their output.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a machine; `vmtasks exec --detach` starts one."""
    with machine(name) as of:
        found = of.jobs.list()
        if clear:
            for view in found:
                if view.state not in ("starting", "running"):
                    of.jobs.remove(view.job)
                    progress.say(f"job {view.job}: removed")
            return
    if as_json:
        show([asdict(view) for view in found])
        return
    rows = []
    for view in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.started)) if view.started else ""
        status = "" if view.status is None else str(view.status)
        rows.append((view.job, view.state, status, began, str(view.size), view.title))
    table(("JOB", "STATE", "STATUS", "STARTED", "BYTES", "COMMAND"), rows)


@app.command(cls=Through, rich_help_panel="Jobs")
def attach(name: Name, which: Job) -> None:
    """Show all that a job has written, and go on until it is over; the exit status is the job's. Ctrl-C lets it run."""
    with machine(name) as found, health.warn_when_stuck(found.place), using(found.place, "attach", which) as outcome:
        end = found.jobs.follow(which, timeout_s=FOREVER_S, on_data=_pass_on, keep=False)
        outcome.status = end.status
    raise typer.Exit(end.status)


@app.command(rich_help_panel="Jobs")
def cancel(name: Name, which: Job) -> None:
    """End a job with all that it has started: SIGTERM, then SIGKILL."""
    with machine(name) as found:
        view = found.jobs.cancel(which)
    progress.say(f"job {view.job}: {_how(view)}")


def start_job(name: str, words: list[str], *, cwd: str, env: dict[str, str], user: str) -> str:
    """Start a program as a job; returns its id."""
    with machine(name) as found:
        life.wait_ready(found.place)
        with using(found.place, "exec", shlex.join(words), user, goes_on=True) as outcome:
            started = found.jobs.start(words, cwd=cwd, env=env, user=user)
            outcome.status = 0
    return started


def _how(view: "JobView") -> str:
    """What is known of a job's end, if it has ended."""
    unknown = "its exit status is not known"
    if view.state == "rebooted":
        return f"ended by a reboot of the guest; {unknown}"
    if view.state == "lost":
        return f"over, because what ran it in the guest was killed; {unknown}"
    if view.state == "damaged":
        return f"over, but its status in the guest cannot be read; {unknown}"
    if view.status is None:
        return f"still {view.state}"
    return f"ended by signal {view.signal}, status {view.status}" if view.signal else f"ended, status {view.status}"


def _pass_on(data: bytes, stream: str) -> None:
    sink = (sys.stderr if stream == "stderr" else sys.stdout).buffer
    sink.write(data)
    sink.flush()
