"""`vmtasks init | prune | schema`: a project of somebody's own, and a tidy store."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vmtasks import printable
from vmtasks.cli.common import app, project
from vmtasks.config.load import default_store
from vmtasks.config.scaffold import scaffold, write_schemas
from vmtasks.errors import ConfigError
from vmtasks.images import prune as pruning
from vmtasks.machines import Project
from vmtasks.store.store import Store


@app.command(rich_help_panel="Projects")
def init(
    folder: Annotated[Path, typer.Argument(help="The project's folder; made if it is not there.")],
    guest: Annotated[str, typer.Option(help="The guest to copy into phases/.")] = "tiny",
) -> None:
    """Write dodo.py, config/vm.toml and a guest's phases into a project; nothing that is there is overwritten."""
    for path in scaffold(folder, guest):
        typer.echo(f"wrote {path}")
    there = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    typer.echo(f"next: {there}doit auto_install quick", err=True)


@app.command(rich_help_panel="Projects")
def prune(
    store: Annotated[
        Path | None, typer.Option(envvar="VMTASKS_STORE", help="The store; by default the user's cache folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    forget: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A project, or its state folder, that is gone for good.", show_default=False),
    ] = None,
) -> None:
    """Remove images and installers that no project's record names, and machines whose command is gone.

    A project's folder that is not there just now, and a record that cannot be read, keep what they named last.
    """
    here = None
    try:
        here = Project.find(Path.cwd(), os.environ).config() if dry_run else project().config()
    except ConfigError as error:
        typer.echo(f"machines were not looked at: {printable.text(error.message)}", err=True)
    made = Store(store or (here.store_dir if here else default_store(os.environ)))
    if here is not None and here.vm_dir.is_dir() and here.store_dir == made.root and made.root.is_dir():
        pruning.register(made, here.vm_dir)  # a project that was moved names its images from its new place
    pruned = pruning.prune(made, dry_run=dry_run, forget=forget)
    for path in pruned.gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    for warning in pruned.warnings:
        typer.echo(f"warning: {printable.text(warning)}", err=True)
    verb = "would be removed" if dry_run else "removed"
    typer.echo(f"{len(pruned.gone)} {verb}, {pruned.size >> 20} MiB, from {made.root}", err=True)


@app.command(rich_help_panel="Projects")
def schema(
    folder: Annotated[Path, typer.Argument(help="Where vm.schema.json and guest.schema.json are written.")],
) -> None:
    """Write the JSON schemas of vm.toml and guest.toml, for editors."""
    for path in write_schemas(folder, folder):
        typer.echo(f"wrote {path}")
