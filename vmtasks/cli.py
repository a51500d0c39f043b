"""`vmtasks ...`: what is wanted outside a project's task graph; `init` starts one."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vmtasks import __version__
from vmtasks.errors import VmTasksError

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line; failures that a user can mend end without a traceback."""
    try:
        app()
    except VmTasksError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,  # noqa: FBT002
) -> None:
    """Unattended, phase-cached OS installs in QEMU, and remote test suites that rerun only when stale."""
    if version:
        typer.echo(f"vmtasks {__version__}")
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The project's folder; made if it is not there.")],
    guest: Annotated[str, typer.Option(help="The guest to copy into phases/.")] = "tiny",
) -> None:
    """Write dodo.py, config/vm.toml and a guest's phases into a project; nothing that is there is overwritten."""
    from vmtasks.scaffold import scaffold  # noqa: PLC0415

    for path in scaffold(folder, guest):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: cd {folder} && doit auto_install quick", err=True)


@app.command()
def prune(
    store: Annotated[
        Path | None, typer.Option(envvar="VMTASKS_STORE", help="The store; by default the user's cache folder.")
    ] = None,
) -> None:
    """Remove images and installers that no project's record names."""
    from vmtasks.config import default_store  # noqa: PLC0415
    from vmtasks.store import Store  # noqa: PLC0415
    from vmtasks.tidy import prune as tidy  # noqa: PLC0415

    root = store or default_store(os.environ)
    gone, size = tidy(Store(root))
    for path in gone:
        typer.echo(f"removed {path}")
    typer.echo(f"{len(gone)} removed, {size >> 20} MiB, from {root}", err=True)


@app.command()
def schema(
    folder: Annotated[Path, typer.Argument(help="Where vm.schema.json and guest.schema.json are written.")],
) -> None:
    """Write the JSON schemas of vm.toml and guest.toml, for editors."""
    from vmtasks.scaffold import write_schemas  # noqa: PLC0415

    for path in write_schemas(folder, folder):
        typer.echo(f"wrote {path}")
