"""What all verbs share: the application, the current project, output, and arguments with completion."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

import vmtasks
from vmtasks import printable
from vmtasks.cli.complete import names
from vmtasks.errors import ConfigError, VmTasksError, os_failure
from vmtasks.host.progress import accept_any_text, open_streams, talk, talk_on_stderr, tell_notes, to_stderr
from vmtasks.host.signals import ignore, unwind_on_signals

if TYPE_CHECKING:
    from vmtasks import Machine, Project


F = TypeVar("F", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command that refuses empty arguments, which come from unset shell variables."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does. ConfigError for an empty value."""
        rest = super().parse_args(ctx, args)
        for item in () if ctx.resilient_parsing else self.params:
            source = ctx.get_parameter_source(item.name)
            given = ctx.params.get(item.name)
            empty = "" in given if isinstance(given, (list, tuple)) else given == ""
            if source is not None and source.name == "COMMANDLINE" and empty:
                shown = item.opts[-1] if item.param_type_name == "option" else str(item.metavar)
                otherwise = "" if item.required else ", or leave it out"
                raise ConfigError(f"{shown} '': empty; give a value{otherwise}")
        return rest


class PassThrough(Command):
    """A command that exits with the status of what it runs, and with VMTASKS_FAILED when vmtasks itself fails."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. SystemExit for a failure of our own."""
        try:
            return super().invoke(ctx)
        except (VmTasksError, OSError) as error:
            raise SystemExit(report(error, VMTASKS_FAILED)) from None


class App(typer.Typer):
    """A Typer whose commands are of class Command by default."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] = Command, **more: Any) -> Callable[[F], F]:  # type: ignore[override]
        """See typer.Typer.command()."""
        return super().command(name, cls=cls, **more)


app = App(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
VMTASKS_FAILED = 125
"""Exit status of `run`, `exec`, `ssh` and `attach` when vmtasks itself fails; podman uses the same."""

VERBATIM = {"allow_extra_args": True, "allow_interspersed_args": False}
"""Settings of commands that end in the command line of another program."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="The machine.", autocompletion=names, show_default=False)]
AnyName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The machine; by default the project's.", autocompletion=names, show_default=False
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME", help="Machines; by default the project's.", autocompletion=names, show_default=False
    ),
]
Every = Annotated[bool, typer.Option("--all", "-a", help="All machines of this project.")]
Interactive = Annotated[bool, typer.Option("--interactive", "-i", help="Pass our standard input to it.")]
Tty = Annotated[bool, typer.Option("--tty", "-t", help="Allocate a terminal; -it for interactive use.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(load: Callable[[], object]) -> None:
    """Call `load`, which registers verbs, and run the command line. User errors print no traceback."""
    open_streams()
    accept_any_text()
    talk()
    caught = unwind_on_signals()
    status = 0
    try:
        load()
        status = _status()
        ignore()
    except BaseException:
        if not caught:
            raise  # after a signal, the signal is the cause
    raise SystemExit(128 + caught[0] if caught else status)


def _status() -> int:
    """Run the command line; returns the exit status."""
    try:
        app(prog_name="vmtasks")
    except (VmTasksError, OSError) as error:
        return report(error)
    except SystemExit as end:
        tell_notes(end)
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except KeyboardInterrupt as end:
        tell_notes(end)
        return 130
    return 0


def report(error: VmTasksError | OSError, otherwise: int = VmTasksError.exit_code) -> int:
    """Print a failure that the user can fix; returns 2 for a ConfigError, else `otherwise`.

    Raises an OSError that is a bug again.
    """
    if isinstance(error, VmTasksError):
        to_stderr(f"error: {error}\n")
        return error.exit_code if isinstance(error, ConfigError) else otherwise
    if not (failure := os_failure(error)):
        raise error
    to_stderr(f"error: {failure}\n")
    return otherwise


@app.callback(invoke_without_command=True)
def _everywhere(
    folder: Annotated[
        Path | None, typer.Option("-C", metavar="DIR", help="Run as if started in this folder.", show_default=False)
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the programs that are run.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Run virtual machines from images that `doit` has installed: start, log in, copy files, stop."""
    if version:
        typer.echo(f"vmtasks {vmtasks.__version__}")
        raise typer.Exit
    if verbose:
        logging.basicConfig(format="+ %(message)s", stream=sys.stderr)
        logging.getLogger("vmtasks").setLevel(logging.DEBUG)
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise ConfigError(f"-C {folder}: {error.strerror}") from None


def project() -> "Project":
    """The project of the current folder, without machines whose owner has died. Keeps stdout for data from now on."""
    talk_on_stderr()
    here = vmtasks.Project.find(Path.cwd(), os.environ)
    here.reap()
    return here


def find_machine(name: str) -> "Machine":
    """The machine of this name; for '' the project's."""
    return project().machine(name)


def show(data: object) -> None:
    """Print JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table. Control sequences and line ends in cells, which may come from a guest, are removed."""
    lines = [tuple(map(printable.line, row)) for row in (head, *rows)]
    widths = [max(len(row[n]) for row in lines) for n in range(len(head))]
    for row in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def selected(here: "Project", names: Sequence[str], *, every: bool) -> list[str]:
    """The machines named, without duplicates; with `every` all; else the project's. ConfigError for both."""
    if every and names:
        raise ConfigError("name machines, or give --all; not both")
    if every:
        return here.names()
    return list(dict.fromkeys(names)) or [here.config().name]


class Attempts:
    """Work on several machines: failures are printed, the rest is still tried, and the exit status is 1."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: all that will be tried. With only one, its failure is raised."""
        self._several = len(names) > 1
        self.failed = False

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The attempt with one of them."""
        try:
            yield
        except VmTasksError as error:
            if not self._several:
                raise
            to_stderr(f"error: {name}: {error}\n")
            self.failed = True

    def end(self) -> None:
        """Exit with 1 if any attempt has failed."""
        if self.failed:
            raise typer.Exit(1)


def each(names: Sequence[str], work: Callable[[str], None]) -> None:
    """Call `work` for each of these machines; see Attempts."""
    attempts = Attempts(names)
    for name in names:
        with attempts.of(name):
            work(name)
    attempts.end()
