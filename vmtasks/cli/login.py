"""`vmtasks ssh | exec | forward | console | ssh-config`: use a machine over SSH or its console."""

import re
import shlex
import sys
from typing import Annotated, Any

import typer

from vmtasks.cli.common import (
    VERBATIM,
    VMTASKS_FAILED,
    AnyName,
    Interactive,
    Name,
    PassThrough,
    Tty,
    app,
    find_machine,
    report,
)
from vmtasks.cli.jobs import FOREVER_S, start_job
from vmtasks.config import arguments
from vmtasks.config.rules import VARIABLE
from vmtasks.errors import CommandTimeoutError, ConfigError
from vmtasks.host import process, progress
from vmtasks.host.process import TIMED_OUT
from vmtasks.machines import Machine, life
from vmtasks.machines.sessions import recorded_session
from vmtasks.qemu.terminal import attach_console

WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
"""Options of ssh(1) that take a value."""


@app.command(cls=PassThrough, context_settings=VERBATIM, rich_help_panel="Use")
def ssh(
    ctx: typer.Context,
    name: Name,
    show: Annotated[bool, typer.Option("--print", help="Only print the command.")] = False,
) -> None:
    """Log in, or run a command: `vmtasks ssh NAME [-- SSH-OPTIONS] [COMMAND]`.

    One word is a line for the remote shell; several are passed on as they are. As with ssh(1), the command reads our
    standard input (`-- -n` prevents that), and 255 means that SSH itself failed. Otherwise the exit status is the
    command's; 125 when vmtasks failed.
    """
    machine = find_machine(name)
    if show:
        machine.require_running()
        sys.stdout.write(f"{machine.ssh_line()}\n")
        return
    options, words = split_ssh_arguments(ctx.args)
    raise typer.Exit(session(machine, "ssh", options, words))


@app.command("exec", cls=PassThrough, context_settings=VERBATIM, rich_help_panel="Use")
def execute(
    ctx: typer.Context,
    name: Name,
    user: Annotated[str, typer.Option(help="Run as this user of the guest.", show_default=False)] = "",
    cwd: Annotated[str, typer.Option(help="Run in this folder of the guest.", show_default=False)] = "",
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Repeatable.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Start as a job, and print its id.")] = False,
    interactive: Interactive = False,
    tty: Tty = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until it is killed with status 124.", show_default=False)
    ] = None,
) -> None:
    """Run a program without a shell: `vmtasks exec [OPTIONS] NAME PROGRAM [ARGUMENTS]`.

    Its standard input is empty unless -i is given. The exit status is the program's; 128 + N after signal N; 125 when
    vmtasks or SSH failed, 126 when the program cannot be run, 127 when it does not exist.
    """
    words = ctx.args[1:] if ctx.args[:1] == ["--"] else ctx.args
    if not words:
        raise ConfigError("exec: no program; write vmtasks exec NAME PROGRAM [ARGUMENTS]")
    if detach and (interactive or tty or timeout is not None):
        raise ConfigError("exec: -i, -t and --timeout do not go with -d: a job has no standard input and no timeout")
    if timeout is not None and not 0 < timeout < FOREVER_S:
        raise ConfigError(f"--timeout {timeout:g}: use seconds, more than 0")
    given: dict[str, Any] = {"cwd": cwd, "env": _variables(env or []), "user": arguments.user(user) if user else ""}
    if detach:
        sys.stdout.write(f"{start_job(name, words, **given)}\n")
        return
    shown = shlex.join(words)
    try:
        status = find_machine(name).shell(
            f"command {shown}", verb="exec", failed=VMTASKS_FAILED, shown=shown, stdin=interactive,
            timeout_s=timeout, tty=tty, **given,
        )  # fmt: skip
    except CommandTimeoutError as late:
        report(late)
        raise typer.Exit(TIMED_OUT) from None
    raise typer.Exit(status)


def _variables(given: list[str]) -> dict[str, str]:
    """Parse NAME=VALUE words. ConfigError for any other."""
    values = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not VARIABLE.fullmatch(key):
            raise ConfigError(f"--env {item!r}: write NAME=VALUE")
        values[key] = value
    return values


def split_ssh_arguments(words: list[str]) -> tuple[list[str], list[str]]:
    """Split `[--] [ssh options] [--] [command]` into the options and the words of the command."""
    rest = list(words[1:] if words[:1] == ["--"] else words)
    options: list[str] = []
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        options.append(word)
        # As getopt: flags may be grouped; an option with a value takes the rest of the word, or else the next word.
        taking = next((n for n, letter in enumerate(word[1:], 1) if letter in WITH_VALUE), None)
        if taking == len(word) - 1 and rest:
            options.append(rest.pop(0))
    return options, rest


def session(machine: Machine, verb: str, options: list[str], words: list[str], **more: Any) -> int:
    """Log in to a machine, or run a command in it, on our streams; returns its exit status.

    `more` as for Machine.shell().
    """
    shown = words[0] if len(words) == 1 else shlex.join(words)
    # The login shell runs it as a child, which turns death by a signal into an exit status.
    command = f'"${{SHELL:-/bin/sh}}" -c {shlex.quote(shown)}' if words else ""
    return machine.shell(command, verb=verb, options=options, shown=shown, **more)


@app.command(rich_help_panel="Use")
def forward(
    name: Name,
    local: Annotated[
        list[str] | None, typer.Option("-L", metavar="PORT:HOST:PORT", help="From this host to the guest.")
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
        options += [kind, bind_to_loopback(kind, item)]
    machine = find_machine(name)
    target = life.wait_ready(machine.place)
    progress.say(f"forwarding {', '.join(f'{kind} {item}' for kind, item in wanted)}; Ctrl-C stops")
    with recorded_session(machine.place, "forward", shlex.join(options[5:])) as outcome:
        outcome.status = process.run_attached(target.argv(options=options))
    raise typer.Exit(outcome.status)


def bind_to_loopback(kind: str, text: str) -> str:
    """Add 127.0.0.1 to a forward without a bind address. ConfigError for another address, or a wrong port."""
    fields = text.split(":")
    plain = 1 if kind == "-D" else 3
    form = "PORT" if kind == "-D" else "PORT:HOST:PORT"
    explicit = len(fields) == plain + 1
    if (explicit and fields[0] not in ("127.0.0.1", "localhost")) or not plain <= len(fields) <= plain + 1:
        raise ConfigError(f"{kind} {text!r}: write {form}; the listener is always on 127.0.0.1")
    listener, *destination = fields[explicit:]
    for port, least in ((listener, 0 if kind == "-R" else 1), *((port, 1) for port in destination[1:])):
        if not re.fullmatch(r"[0-9]{1,5}", port) or not least <= int(port) <= 65535:
            raise ConfigError(
                f"{kind} {text!r}: {port!r} is not a port; write {form}, with ports from {least} to 65535"
            )
    if destination and not destination[0]:
        raise ConfigError(f"{kind} {text!r}: the host is missing; write {form}")
    return text if explicit else f"127.0.0.1:{text}"


@app.command("ssh-config", rich_help_panel="Use")
def ssh_config(name: AnyName = "") -> None:
    """Print the `Host` block for ssh, scp, sftp, rsync, git and editors: `vmtasks ssh-config NAME >>~/.ssh/config`."""
    sys.stdout.write(find_machine(name).require_running().config.read_text())


@app.command(rich_help_panel="Use")
def console(name: AnyName = "") -> None:
    """Attach this terminal to the guest's serial console, which works without SSH; Ctrl-] detaches."""
    machine = find_machine(name)
    machine.require_running()
    attach_console(machine.place.serial, machine.name)
