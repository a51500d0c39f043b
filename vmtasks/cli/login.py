"""`vmtasks ssh | exec | forward | console | ssh-config`: into a machine, by SSH or by its console."""

import re
import shlex
import sys
from typing import Annotated, Any

import typer

from vmtasks.cli.common import OWN, VERBATIM, AnyName, Interactive, Name, Through, Tty, app, machine, report
from vmtasks.cli.jobs import FOREVER_S, start_job
from vmtasks.config import arguments
from vmtasks.config.rules import VARIABLE
from vmtasks.errors import CommandTimeoutError, ConfigError
from vmtasks.host import process, progress
from vmtasks.host.process import TIMED_OUT
from vmtasks.machines import Machine, life
from vmtasks.machines.sessions import using
from vmtasks.qemu.terminal import attach_console

WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
"""Options of ssh(1) that take a value."""


@app.command(cls=Through, context_settings=VERBATIM, rich_help_panel="Use")
def ssh(
    ctx: typer.Context,
    name: Name,
    show: Annotated[bool, typer.Option("--print", help="Only print the command line.")] = False,
) -> None:
    """Log in, or run a command: `vmtasks ssh NAME [-- SSH-OPTIONS] [COMMAND]`.

    One word is a line for the remote shell; several are passed on as they are. As with ssh(1), the command reads our
    standard input (`-- -n` hands nothing on), and 255 says that SSH itself failed. Else the exit status is that of the
    command; 125 when vmtasks has failed.
    """
    found = machine(name)
    if show:
        found.require_running()
        sys.stdout.write(f"{found.ssh_line()}\n")
        return
    options, words = split(ctx.args)
    raise typer.Exit(session(found, "ssh", options, words))


@app.command("exec", cls=Through, context_settings=VERBATIM, rich_help_panel="Use")
def execute(
    ctx: typer.Context,
    name: Name,
    user: Annotated[str, typer.Option(help="Run as this user of the guest.", show_default=False)] = "",
    cwd: Annotated[str, typer.Option(help="Run in this folder of the guest.", show_default=False)] = "",
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Repeatable.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="As a job: print its id and let it run.")] = False,
    interactive: Interactive = False,
    tty: Tty = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds; then it is ended, and the status is 124.", show_default=False)
    ] = None,
) -> None:
    """Run a program with its arguments as they are: `vmtasks exec [OPTIONS] NAME PROGRAM [ARGUMENTS]`.

    No shell of the guest sees them. It reads nothing unless -i is given. The exit status is the program's; 128 + N
    after signal N; 125 when vmtasks or SSH has failed, 126 when the program cannot be run, 127 when it is not there.
    """
    words = ctx.args[1:] if ctx.args[:1] == ["--"] else ctx.args
    if not words:
        raise ConfigError("exec: no program; write vmtasks exec NAME PROGRAM [ARGUMENTS]")
    if detach and (interactive or tty or timeout is not None):
        raise ConfigError("exec: -i, -t and --timeout do not go with -d: a job reads nothing, and nobody waits for it")
    if timeout is not None and not 0 < timeout < FOREVER_S:
        raise ConfigError(f"--timeout {timeout:g}: use seconds, more than 0")
    given: dict[str, Any] = {"cwd": cwd, "env": _variables(env or []), "user": arguments.user(user) if user else ""}
    if detach:
        sys.stdout.write(f"{start_job(name, words, **given)}\n")
        return
    shown = shlex.join(words)
    try:
        status = machine(name).shell(
            f"command {shown}", verb="exec", failed=OWN, shown=shown, stdin=interactive, timeout_s=timeout, tty=tty,
            **given,
        )  # fmt: skip
    except CommandTimeoutError as late:
        report(late)
        raise typer.Exit(TIMED_OUT) from None
    raise typer.Exit(status)


def _variables(given: list[str]) -> dict[str, str]:
    """`NAME=VALUE` each. ConfigError for what is not."""
    values = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not VARIABLE.fullmatch(key):
            raise ConfigError(f"--env {item!r}: write NAME=VALUE")
        values[key] = value
    return values


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """`[--] [ssh options] [--] [command]` -> the options, and the words of the command."""
    rest = list(words[1:] if words[:1] == ["--"] else words)
    options: list[str] = []
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        options.append(word)
        # As getopt: letters without a value may stand together; the first that takes one takes the rest, or the next.
        taking = next((n for n, letter in enumerate(word[1:], 1) if letter in WITH_VALUE), None)
        if taking == len(word) - 1 and rest:
            options.append(rest.pop(0))
    return options, rest


def session(found: "Machine", verb: str, options: list[str], words: list[str], **more: Any) -> int:
    """Log in to a machine, or run a command in it, with our streams; returns the status of what ran.

    `more` as for Machine.shell().
    """
    shown = words[0] if len(words) == 1 else shlex.join(words)
    # The login shell runs it as a child, so that a death by signal becomes a status, as in any shell.
    command = f'"${{SHELL:-/bin/sh}}" -c {shlex.quote(shown)}' if words else ""
    return found.shell(command, verb=verb, options=options, shown=shown, **more)


@app.command(rich_help_panel="Use")
def forward(
    name: Name,
    local: Annotated[
        list[str] | None, typer.Option("-L", metavar="PORT:HOST:PORT", help="From this host into the guest.")
    ] = None,
    remote: Annotated[
        list[str] | None, typer.Option("-R", metavar="PORT:HOST:PORT", help="From the guest to this host.")
    ] = None,
    dynamic: Annotated[
        list[str] | None, typer.Option("-D", metavar="PORT", help="A SOCKS proxy on this host, through the guest.")
    ] = None,
) -> None:
    """Forward ports over SSH until Ctrl-C; listeners are on loopback only."""
    wanted = [("-L", item) for item in local or []] + [("-R", item) for item in remote or []]
    wanted += [("-D", item) for item in dynamic or []]
    if not wanted:
        raise ConfigError("forward: nothing to forward; give -L, -R or -D")
    options = ["-N", "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"]
    for kind, item in wanted:
        options += [kind, loopback(kind, item)]
    found = machine(name)
    target = life.wait_ready(found.place)
    progress.say(f"forwarding {', '.join(f'{kind} {item}' for kind, item in wanted)}; Ctrl-C ends it")
    with using(found.place, "forward", shlex.join(options[5:])) as outcome:
        outcome.status = process.attach(target.argv(options=options))
    raise typer.Exit(outcome.status)


def loopback(kind: str, text: str) -> str:
    """A forward with its listener on loopback. ConfigError for any other address."""
    fields = text.split(":")
    plain = 1 if kind == "-D" else 3
    form = "PORT" if kind == "-D" else "PORT:HOST:PORT"
    explicit = len(fields) == plain + 1
    if (explicit and fields[0] not in ("127.0.0.1", "localhost")) or not plain <= len(fields) <= plain + 1:
        raise ConfigError(f"{kind} {text!r}: write {form}; the listener is always on 127.0.0.1")
    listener, *to = fields[explicit:]
    for port, least in ((listener, 0 if kind == "-R" else 1), *((port, 1) for port in to[1:])):
        if not re.fullmatch(r"[0-9]{1,5}", port) or not least <= int(port) <= 65535:
            raise ConfigError(
                f"{kind} {text!r}: {port!r} is not a port; write {form}, with ports from {least} to 65535"
            )
    if to and not to[0]:
        raise ConfigError(f"{kind} {text!r}: the host is missing; write {form}")
    return text if explicit else f"127.0.0.1:{text}"


@app.command("ssh-config", rich_help_panel="Use")
def ssh_config(name: AnyName = "") -> None:
    """Print the `Host` block for ssh, scp, sftp, rsync, git and editors: `vmtasks ssh-config NAME >>~/.ssh/config`."""
    found = machine(name)
    sys.stdout.write(found.require_running().config.read_text())


@app.command(rich_help_panel="Use")
def console(name: AnyName = "") -> None:
    """Attach this terminal to the guest's serial console, also when SSH is dead; Ctrl-] detaches."""
    found = machine(name)
    found.require_running()
    attach_console(found.place.serial, found.name)
