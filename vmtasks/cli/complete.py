"""What the shell completes: machines, images, snapshots, jobs. It never fails, and asks a guest only for its jobs."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vmtasks.errors import VmTasksError

if TYPE_CHECKING:
    from vmtasks.machines import Project

Complete = Callable[[typer.Context, str], list[str]]


def _completing(found: "Callable[[Project, typer.Context], Iterable[str]]") -> Complete:
    """Those of what `found` gives that begin with what was typed."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        from vmtasks.machines import Project  # noqa: PLC0415

        there: list[str] = []
        try:
            here = Project.find(Path.cwd() / (ctx.find_root().params.get("folder") or ""))
            there.extend(word for word in found(here, ctx) if word.startswith(incomplete))
        except (VmTasksError, OSError):
            pass
        return there

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
    """Snapshots that the machine which was named before can go back to."""
    return here.machine(str(ctx.params["name"])).snapshots()


@_completing
def jobs(here: "Project", ctx: typer.Context) -> Iterator[str]:
    """Jobs of the machine which was named before."""
    from vmtasks.guest import job  # noqa: PLC0415

    with here.machine(str(ctx.params["name"])).link(window_s=0) as link:
        yield from (view.job for view in job.listing(link))
