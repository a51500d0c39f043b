"""`vmtasks run`: make a machine and use it; without -d it goes with the command."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vmtasks.cli import complete
from vmtasks.cli.common import OWN, AsJson, Interactive, Through, Tty, app, project, show
from vmtasks.cli.login import session
from vmtasks.cli.look import described
from vmtasks.config import arguments
from vmtasks.config.arguments import Bind, PublicKey
from vmtasks.errors import ConfigError
from vmtasks.host import progress
from vmtasks.machines import MachineSpec, first_start, temp_machine

COMMAND = "vmtasks.command"
"""Where the words after `--` are kept."""


class WithCommand(Through):
    """A command whose words after the first `--` are left alone, so that IMAGE may be left out before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words after `--` for the command."""
        if "--" in args:
            at = args.index("--")
            ctx.meta[COMMAND] = args[at + 1 :]
            args = args[:at]
        return super().parse_args(ctx, args)


@app.command(cls=WithCommand, options_metavar="[OPTIONS]", rich_help_panel="Machines")
def run(
    ctx: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="GUEST[:SNAPSHOT]; by default the project's guest, and clean.",
            autocompletion=complete.images,
        ),
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running, and print its name.")] = False,
    name: Annotated[str, typer.Option(help="Its name; by default one is made up.", show_default=False)] = "",
    rm: Annotated[bool, typer.Option("--rm", help="With -d: remove it when it is stopped.")] = False,
    memory: Annotated[str, typer.Option(help="RAM: MiB, or with K, M or G.", show_default=False)] = "",
    cpus: Annotated[int | None, typer.Option(min=1, max=255, help="Virtual CPUs.", show_default=False)] = None,
    disk: Annotated[str, typer.Option(help="Size of its disk, as in 20G.", show_default=False)] = "",
    bind: Annotated[
        list[str] | None, typer.Option(metavar="HOST:GUEST[:ro]", help="Have a folder of this host in it; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out of --bind what this rsync pattern matches; repeatable."),
    ] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option("-p", "--port", metavar="HOST:GUEST", help="Forward a loopback port to it; repeatable."),
    ] = None,
    network: Annotated[str, typer.Option(help="user, or none: only SSH reaches it.", show_default=False)] = "",
    ssh_port: Annotated[str, typer.Option(help="Loopback port of its SSH, or auto.")] = "auto",
    ssh_key: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.pub", help="Let the holder of this key in too; repeatable.")
    ] = None,
    user: Annotated[str, typer.Option(help="The user to log in as; it must exist.", show_default=False)] = "",
    interactive: Interactive = False,
    tty: Tty = False,
    as_json: AsJson = False,
) -> None:
    """Make a machine and log in, or run the words after `--` in it; then it is removed, unless -d is given.

    It has a disk, a key and a port of its own. Words after `--` read nothing unless -i is given. The exit status is
    that of the command; 125 when vmtasks or SSH has failed.
    """
    words: list[str] = ctx.meta.get(COMMAND, [])
    if rm and not detach:
        raise ConfigError("--rm goes with -d: without -d the machine is always removed")
    if as_json and not detach:
        raise ConfigError("--json goes with -d: without -d the output is the command's")
    if detach and (words or interactive or tty):
        raise ConfigError("run: a command, -i and -t do not go with -d; vmtasks exec runs one in a machine")
    if exclude and not bind:
        raise ConfigError("--exclude goes with --bind: without --bind there is nothing to leave out")
    spec = MachineSpec.parse(
        image, name=name, memory=memory, cpus=cpus, disk_size=disk, network=network, ssh_port=_ssh_port(ssh_port),
        forwards=publish or [], binds=[Bind.parse(text, tuple(exclude or [])) for text in bind or []],
        authorized=tuple(key for path in ssh_key or [] for key in read_keys(path, "--ssh-key")),
        user=_user(user), throwaway=rm or not detach,
    )  # fmt: skip
    if detach:
        _detached(spec, as_json=as_json)
    else:
        # A shell reads what there is; a command only what it is meant to.
        _coupled(spec, words, stdin=interactive or not words, tty=tty)


def _coupled(spec: "MachineSpec", words: list[str], *, stdin: bool, tty: bool) -> None:

    with temp_machine(spec, project=project()) as machine:
        status = session(machine, "run", [], words, failed=OWN, stdin=stdin, tty=tty)
    progress.say(f"machine {machine.name}: removed")
    raise typer.Exit(status)


def _detached(spec: "MachineSpec", *, as_json: bool) -> None:

    machine = project().create(spec)
    first_start(machine)
    if as_json:
        show(described(machine))
    else:
        sys.stdout.write(f"{machine.name}\n")


# -- what was given


def read_keys(path: Path, what: str) -> "list[PublicKey]":
    """The public keys in a file. ConfigError when it holds none, or a private one, of which nothing is shown.

    `what` named the file: an option, or an argument.
    """
    try:
        text = path.expanduser().read_bytes()[: 1 << 20].decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error.strerror}") from None
    return arguments.public_keys(text, f"{what} {path}")


def _ssh_port(text: str) -> int:

    if text == "auto":
        return 0
    if not text.isascii() or not text.isdigit() or not 1024 <= int(text[:9]) <= 65535:
        raise ConfigError(f"--ssh-port {text!r}: use auto, or a port from 1024 to 65535")
    return int(text)


def _user(text: str) -> str:

    return arguments.user(text) if text else ""
