"""What all commands share: the application, the project they speak of, output, and names that complete."""

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

from vmtasks import __version__, printable
from vmtasks.cli.complete import names
from vmtasks.errors import ConfigError, VmTasksError, os_failure
from vmtasks.host.progress import accept_any_text, open_streams, talk, tell_notes, to_stderr
from vmtasks.host.signals import ignore, unwind_on_signals

if TYPE_CHECKING:
    from vmtasks.machines import Machine, Project


F = TypeVar("F", bound=Callable[..., Any])


class Plain(TyperCommand):
    """A command that takes no empty text for one that was left out: it is what an unset shell variable gives."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever. ConfigError for a value that is given and empty."""
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


class Through(Plain):
    """A command whose exit status is that of what it runs: a failure of our own has one that is told from it."""

    def invoke(self, ctx: Any) -> Any:
        """As ever, but ends with OWN where we have failed ourselves."""
        try:
            return super().invoke(ctx)
        except (VmTasksError, OSError) as error:
            raise SystemExit(report(error, OWN)) from None


class App(typer.Typer):
    """Typer, whose commands are plain unless another kind is asked for."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] = Plain, **more: Any) -> Callable[[F], F]:  # type: ignore[override]
        """As typer has it."""
        return super().command(name, cls=cls, **more)


app = App(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
OWN = 125
"""What `run`, `exec`, `ssh` and `attach` end with when vmtasks itself has failed, as podman does."""

VERBATIM = {"allow_extra_args": True, "allow_interspersed_args": False}
"""For commands whose last words are somebody else's command line."""

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
Interactive = Annotated[bool, typer.Option("--interactive", "-i", help="Hand our standard input on to it.")]
Tty = Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal; -it for somebody who types.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(load: Callable[[], object]) -> None:
    """Have `load` register verbs and run the command line; failures that a user can mend end without a traceback."""
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
            raise  # otherwise what came after the signal is not the reason
    raise SystemExit(128 + caught[0] if caught else status)


def _status() -> int:
    """Run the command line to its exit status."""
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
    """Tell a failure that a user can mend; returns 2 where it was asked for what makes no sense, else `otherwise`.

    An OSError that is a bug is raised again.
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
        Path | None, typer.Option("-C", metavar="DIR", help="As if it was started in this folder.", show_default=False)
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the programs that are run.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Virtual machines in daily use: run one, log in, copy files, stop it; on images that `doit` has installed."""
    if version:
        typer.echo(f"vmtasks {__version__}")
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
    """The project that we are in, after what the dead have left was removed. From now on stdout is for data."""
    from vmtasks.host import progress  # noqa: PLC0415
    from vmtasks.machines import Project  # noqa: PLC0415

    progress.talk_on_stderr()
    found = Project.find(Path.cwd(), os.environ)
    found.reap()
    return found


def machine(name: str) -> "Machine":
    """The machine of this name; with none, the project's."""
    return project().machine(name)


def show(data: object) -> None:
    """Print JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print columns, as wide as they must be. What a guest has named stays on its line, and no terminal obeys it."""
    lines = [tuple(map(printable.line, row)) for row in (head, *rows)]
    widths = [max(len(row[n]) for row in lines) for n in range(len(head))]
    for row in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def chosen(here: "Project", names: Sequence[str], *, every: bool) -> list[str]:
    """The machines that were named, each once, or all there are. ConfigError for both; neither is the project's."""
    if every and names:
        raise ConfigError("name machines, or give --all; not both")
    if every:
        return here.names()
    return list(dict.fromkeys(names)) or [here.config().name]


class Attempts:
    """Work on several machines: all are tried, each failure is told, and the exit status is 1. One fails as ever."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are all that will be tried."""
        self._several = len(names) > 1
        self.failed = False

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """One of them."""
        try:
            yield
        except VmTasksError as error:
            if not self._several:
                raise
            to_stderr(f"error: {name}: {error}\n")
            self.failed = True

    def end(self) -> None:
        """End with the status of all."""
        if self.failed:
            raise typer.Exit(1)


def each(names: Sequence[str], work: Callable[[str], None]) -> None:
    """Do something with each of these machines."""
    attempts = Attempts(names)
    for name in names:
        with attempts.of(name):
            work(name)
    attempts.end()
