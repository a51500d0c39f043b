"""`vmtasks init | prune | schema`: set up a project, clean up the store."""

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
    folder: Annotated[Path, typer.Argument(help="The project's folder; created if missing.")],
    guest: Annotated[str, typer.Option(help="The guest to copy into phases/.")] = "tiny",
) -> None:
    """Write dodo.py, config/vm.toml and a guest's phases into a project; overwrites nothing."""
    for path in scaffold(folder, guest):
        typer.echo(f"wrote {path}")
    change_folder = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    typer.echo(f"next: {change_folder}doit auto_install quick", err=True)


@app.command(rich_help_panel="Projects")
def prune(
    store: Annotated[
        Path | None, typer.Option(envvar="VMTASKS_STORE", help="The store; by default the user's cache folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    forget: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A project, or its state folder, that no longer exists.", show_default=False),
    ] = None,
) -> None:
    """Remove images and installers that no project's record names, and machines whose command has ended.

    A project whose folder is missing, or whose record cannot be read, keeps what it named last.
    """
    here = None
    try:
        here = Project.find(Path.cwd(), os.environ).config() if dry_run else project().config()
    except ConfigError as error:
        typer.echo(f"machines were not checked: {printable.text(error.message)}", err=True)
    used_store = Store(store or (here.store_dir if here else default_store(os.environ)))
    if here is not None and here.vm_dir.is_dir() and here.store_dir == used_store.root and used_store.root.is_dir():
        pruning.register(used_store, here.vm_dir)  # the project may have been moved
    pruned = pruning.prune(used_store, dry_run=dry_run, forget=forget)
    for path in pruned.gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    for warning in pruned.warnings:
        typer.echo(f"warning: {printable.text(warning)}", err=True)
    verb = "would be removed" if dry_run else "removed"
    typer.echo(f"{len(pruned.gone)} {verb}, {pruned.size >> 20} MiB, from {used_store.root}", err=True)


@app.command(rich_help_panel="Projects")
def schema(
    folder: Annotated[Path, typer.Argument(help="Where vm.schema.json and guest.schema.json are written.")],
) -> None:
    """Write the JSON schemas of vm.toml and guest.toml, for editors."""
    for path in write_schemas(folder, folder):
        typer.echo(f"wrote {path}")
