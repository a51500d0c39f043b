"""`vmtasks cp`: copy files and folders to and from a machine."""

from pathlib import Path
from typing import Annotated

import typer

from vmtasks.cli.common import app, project
from vmtasks.errors import ConfigError, StateError
from vmtasks.guest import ssh
from vmtasks.machines import health, life
from vmtasks.machines.sessions import recorded_session


@app.command(rich_help_panel="Use")
def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A local path, or NAME:PATH.", show_default=False)],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A local path, or NAME:PATH.", show_default=False)],
) -> None:
    """Copy a file or folder with modes and times; one side is NAME:PATH, relative to the login user's home."""
    here = project()
    known = here.names()
    into, out_of = parse_remote(dest, known), parse_remote(source, known)
    if bool(into) == bool(out_of):
        raise ConfigError("cp: one side must be NAME:PATH of a machine, the other a local path")
    name, path = into or out_of or ("", "")
    if into and not Path(source).exists():
        raise StateError(f"cp: there is no {source}")
    machine = here.machine(name)
    target = life.wait_ready(machine.place)
    # scp takes no absolute path for a host or an option.
    local = str(Path(source if into else dest).absolute()) + ("/" if (source if into else dest).endswith("/") else "")
    remote = f"{target.name}:{path or '.'}"
    words = target.scp(local, remote) if into else target.scp(remote, local)
    with health.warn_when_stuck(machine.place), recorded_session(machine.place, "cp", f"{source} {dest}") as outcome:
        outcome.status = ssh.run_attached(target, words)
    raise typer.Exit(outcome.status)


def parse_remote(text: str, known: list[str]) -> tuple[str, str] | None:
    """Machine and path of NAME:PATH, or None for a local path, which may contain colons too."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name:
        return None
    if name not in known and Path(text).exists():
        return None
    return name, path
