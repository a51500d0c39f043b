"""`vmtasks jobs | attach | cancel`: commands in a machine that outlive the connection and this process."""

import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from vmtasks.cli import complete
from vmtasks.cli.common import AsJson, Name, Through, app, machine, show, table

if TYPE_CHECKING:
    from vmtasks.guest.jobview import View
    from vmtasks.guest.link import Link

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
    from dataclasses import asdict  # noqa: PLC0415

    from vmtasks.guest import job  # noqa: PLC0415
    from vmtasks.host import progress  # noqa: PLC0415

    with _link(name) as link:
        found = job.listing(link)
        if clear:
            for view in found:
                if view.state not in ("starting", "running"):
                    job.remove(link, view.job)
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
    from vmtasks.guest import job  # noqa: PLC0415
    from vmtasks.host import progress  # noqa: PLC0415
    from vmtasks.machines import health  # noqa: PLC0415
    from vmtasks.machines.sessions import using  # noqa: PLC0415

    found = machine(name)
    found.wait()
    with health.telling(found, progress.say), found.link() as link, using(found, "attach", which) as outcome:
        link.open(wait_s=link.window_s)  # what is lost before a word was shown is waited for as what is lost later
        known = _find(link, which)
        end = job.follow(link, known, timeout_s=FOREVER_S, on_data=_pass_on, keep=False)
        outcome.status = end.status
    raise typer.Exit(end.status)


@app.command(rich_help_panel="Jobs")
def cancel(name: Name, which: Job) -> None:
    """End a job with all that it has started: SIGTERM, then SIGKILL."""
    from vmtasks.guest import job  # noqa: PLC0415
    from vmtasks.host import progress  # noqa: PLC0415

    with _link(name) as link:
        view = job.cancel(link, _find(link, which))
    progress.say(f"job {view.job}: {_how(view)}")


def start_job(name: str, words: list[str], *, cwd: str, env: dict[str, str], user: str) -> str:
    """Start a program as a job; returns its id."""
    from vmtasks.guest import job  # noqa: PLC0415
    from vmtasks.machines.sessions import using  # noqa: PLC0415

    found = machine(name)
    found.wait()
    with found.link() as link, using(found, "exec", shlex.join(words), user, goes_on=True) as outcome:
        started = job.start(link, words, cwd=cwd, env=env, user=user)
        outcome.status = 0
    return started


def _link(name: str) -> "Link":
    found = machine(name)
    found.wait()
    return found.link()


def _find(link: "Link", which: str) -> str:
    """The id that begins with `which`."""
    from vmtasks.errors import StateError  # noqa: PLC0415
    from vmtasks.guest import job  # noqa: PLC0415

    found = [view.job for view in job.listing(link) if view.job.startswith(which)]
    if len(found) != 1:
        of = link.target.name
        many = f"{len(found)} jobs of {of} begin" if found else f"no job of {of} begins"
        raise StateError(f"{many} with {which!r}", hint=f"vmtasks jobs {of}")
    return found[0]


def _how(view: "View") -> str:
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
