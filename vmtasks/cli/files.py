"""`vmtasks cp`: files and folders into a machine and out of it."""

from pathlib import Path
from typing import Annotated

import typer

from vmtasks.cli.common import app, project
from vmtasks.errors import ConfigError, StateError
from vmtasks.guest import ssh
from vmtasks.machines import health, life
from vmtasks.machines.sessions import using


@app.command(rich_help_panel="Use")
def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A path here, or NAME:PATH.", show_default=False)],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A path here, or NAME:PATH.", show_default=False)],
) -> None:
    """Copy a file or a folder, with modes and times; one side is NAME:PATH, relative to the login user's home."""
    here = project()
    known = here.names()
    into, out_of = _remote(dest, known), _remote(source, known)
    if bool(into) == bool(out_of):
        raise ConfigError("cp: one side must be NAME:PATH of a machine, the other a path here")
    name, path = into or out_of or ("", "")
    if into and not Path(source).exists():
        raise StateError(f"cp: there is no {source}")
    found = here.machine(name)
    target = life.wait_ready(found.place)
    # With a folder before it, no local name is taken for a host or an option.
    ours = str(Path(source if into else dest).absolute()) + ("/" if (source if into else dest).endswith("/") else "")
    theirs = f"{target.name}:{path or '.'}"
    words = target.scp(ours, theirs) if into else target.scp(theirs, ours)
    with health.warn_when_stuck(found.place), using(found.place, "cp", f"{source} {dest}") as outcome:
        outcome.status = ssh.attach(target, words)
    raise typer.Exit(outcome.status)


def _remote(text: str, known: list[str]) -> tuple[str, str] | None:
    """Machine and path, if `text` names a machine; a path here may hold colons too."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name:
        return None
    if name not in known and Path(text).exists():
        return None
    return name, path
