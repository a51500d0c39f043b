"""`vmtasks init | prune | schema`: a project of somebody's own, and a tidy store."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vmtasks.cli.common import app, project


@app.command(rich_help_panel="Projects")
def init(
    folder: Annotated[Path, typer.Argument(help="The project's folder; made if it is not there.")],
    guest: Annotated[str, typer.Option(help="The guest to copy into phases/.")] = "tiny",
) -> None:
    """Write dodo.py, config/vm.toml and a guest's phases into a project; nothing that is there is overwritten."""
    from vmtasks.scaffold import scaffold  # noqa: PLC0415

    for path in scaffold(folder, guest):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: cd {folder} && doit auto_install quick", err=True)


@app.command(rich_help_panel="Projects")
def prune(
    store: Annotated[
        Path | None, typer.Option(envvar="VMTASKS_STORE", help="The store; by default the user's cache folder.")
    ] = None,
) -> None:
    """Remove images and installers that no project's record names, and machines whose command is gone."""
    from vmtasks.config import default_store  # noqa: PLC0415
    from vmtasks.errors import ConfigError  # noqa: PLC0415
    from vmtasks.store import Store  # noqa: PLC0415
    from vmtasks.tidy import prune as tidy  # noqa: PLC0415

    try:
        project()
    except ConfigError as error:
        typer.echo(f"machines were not looked at: {error.message}", err=True)
    root = store or default_store(os.environ)
    gone, size = tidy(Store(root))
    for path in gone:
        typer.echo(f"removed {path}")
    typer.echo(f"{len(gone)} removed, {size >> 20} MiB, from {root}", err=True)


@app.command(rich_help_panel="Projects")
def schema(
    folder: Annotated[Path, typer.Argument(help="Where vm.schema.json and guest.schema.json are written.")],
) -> None:
    """Write the JSON schemas of vm.toml and guest.toml, for editors."""
    from vmtasks.scaffold import write_schemas  # noqa: PLC0415

    for path in write_schemas(folder, folder):
        typer.echo(f"wrote {path}")
