"""`vmtasks keys list | add | rm | rotate`: who may log in to a machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmtasks.cli.common import App, AsJson, Name, app, machine, show, table
from vmtasks.cli.run import read_keys
from vmtasks.errors import StateError
from vmtasks.host import progress
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import Machine, keys, life

group = App(no_args_is_help=True, help="Who may log in to a machine: list, add, rm, rotate.")
app.add_typer(group, name="keys", rich_help_panel="Use")

User = Annotated[str, typer.Option(help="A user of the guest; by default the one we log in as.", show_default=False)]


@group.command("list")
def list_keys(name: Name, user: User = "", as_json: AsJson = False) -> None:
    """Show the keys that let in, with their fingerprints; `machine` is the machine's own."""
    found, record = _running(name)
    there = keys.listed(found.place, record, user or record.ssh_user)
    if as_json:
        show(
            [
                {
                    "type": item.key.kind,
                    "fingerprint": item.key.fingerprint,
                    "comment": item.key.comment,
                    "machine": item.ours,
                }
                for item in there
            ]
        )
        return
    rows = [(item.key.kind, item.key.fingerprint, item.key.comment, "machine" if item.ours else "") for item in there]
    table(("TYPE", "FINGERPRINT", "COMMENT", ""), rows)


@group.command()
def add(
    name: Name,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.pub", help="Public keys, one in each line.", show_default=False)
    ],
    user: User = "",
) -> None:
    """Let the holder of a key in."""
    added = read_keys(file, "FILE.pub")
    found, record = _running(name)
    with found.place.lock():
        keys.add(found.place, record, added, user or record.ssh_user)
    for key in added:
        progress.say(f"machine {found.name}: {user or record.ssh_user} may log in with {key.fingerprint} {key.comment}")


@group.command("rm")
def remove(
    name: Name,
    which: Annotated[str, typer.Argument(metavar="KEY", help="Fingerprint, comment, or FILE.pub.", show_default=False)],
    user: User = "",
) -> None:
    """Refuse a key from now on; the machine's own can only be rotated."""
    found, record = _running(name)
    with found.place.lock():
        gone = keys.remove(found.place, record, which, user or record.ssh_user)
    for key in gone:
        progress.say(f"machine {found.name}: removed {key.fingerprint} {key.comment}")


@group.command()
def rotate(name: Name) -> None:
    """Give a running machine a new key of its own; the old one is refused, sessions that are open stay open."""
    found, record = _running(name)
    if record.key != "own":
        raise StateError(f"machine {found.name} has no key of its own: it is the project's, with the store's key")
    with found.place.lock():
        key = keys.rotate(found.place, record)
    sys.stdout.write(f"{key.fingerprint}\n")


def _running(name: str) -> "tuple[Machine, MachineRecord]":

    found = machine(name)
    life.wait_ready(found.place)
    record = found.place.record()
    if record is None:
        raise StateError(f"machine {name} was removed")
    return found, record
