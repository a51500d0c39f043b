"""Shell completion of machines, images, snapshots and jobs. Never fails; logs in to a guest only for its jobs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import vmtasks
from vmtasks.guest import job

if TYPE_CHECKING:
    from vmtasks import Project

Complete = Callable[[typer.Context, str], list[str]]


def _completing(candidates: "Callable[[Project, typer.Context], Iterable[str]]") -> Complete:
    """Make a completion function: the `candidates` that begin with what was typed."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        words: list[str] = []
        with contextlib.suppress(vmtasks.VmTasksError, OSError):
            here = vmtasks.Project.find(Path.cwd() / (ctx.find_root().params.get("folder") or ""))
            words.extend(word for word in candidates(here, ctx) if word.startswith(incomplete))
        return words

    return complete


@_completing
def names(here: "Project", _: typer.Context) -> Iterable[str]:
    """Machines."""
    return here.names()


@_completing
def guests(here: "Project", _: typer.Context) -> Iterable[str]:
    """Guests."""
    return here.guests()


@_completing
def images(here: "Project", _: typer.Context) -> Iterator[str]:
    """GUEST:SNAPSHOT, as `vmtasks snapshots` lists them."""
    for guest in here.guests():
        for tag in here.snapshots(guest):
            yield f"{guest}:{tag}"


@_completing
def snapshots(here: "Project", ctx: typer.Context) -> Iterable[str]:
    """Snapshots that the machine named before can be restored to."""
    return here.machine(str(ctx.params["name"])).snapshots()


@_completing
def jobs(here: "Project", ctx: typer.Context) -> Iterator[str]:
    """Jobs of the machine named before."""
    with here.machine(str(ctx.params["name"])).link(window_s=0) as link:
        yield from (view.job for view in job.listing(link))
