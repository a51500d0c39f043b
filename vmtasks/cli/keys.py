"""`vmtasks keys list | add | rm | rotate`: who may log in to a machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmtasks.cli.common import App, AsJson, Name, app, find_machine, show, table
from vmtasks.cli.run import read_keys
from vmtasks.errors import StateError
from vmtasks.host import progress
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import Machine, keys, life

group = App(no_args_is_help=True, help="Who may log in to a machine: list, add, rm, rotate.")
app.add_typer(group, name="keys", rich_help_panel="Use")

User = Annotated[str, typer.Option(help="A user of the guest; by default the login user.", show_default=False)]


@group.command("list")
def list_keys(name: Name, user: User = "", as_json: AsJson = False) -> None:
    """List authorized keys with their fingerprints; `machine` marks the machine's own key."""
    machine, record = _require_running(name)
    listed = keys.listed(machine.place, record, user or record.ssh_user)
    if as_json:
        show(
            [
                {
                    "type": item.key.kind,
                    "fingerprint": item.key.fingerprint,
                    "comment": item.key.comment,
                    "machine": item.is_own,
                }
                for item in listed
            ]
        )
        return
    rows = [
        (item.key.kind, item.key.fingerprint, item.key.comment, "machine" if item.is_own else "") for item in listed
    ]
    table(("TYPE", "FINGERPRINT", "COMMENT", ""), rows)


@group.command()
def add(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE.pub", help="Public keys, one per line.", show_default=False)],
    user: User = "",
) -> None:
    """Authorize public keys."""
    added = read_keys(file, "FILE.pub")
    machine, record = _require_running(name)
    with machine.place.lock():
        keys.add(machine.place, record, added, user or record.ssh_user)
    for key in added:
        progress.say(
            f"machine {machine.name}: {user or record.ssh_user} may log in with {key.fingerprint} {key.comment}"
        )


@group.command("rm")
def remove(
    name: Name,
    which: Annotated[str, typer.Argument(metavar="KEY", help="Fingerprint, comment, or FILE.pub.", show_default=False)],
    user: User = "",
) -> None:
    """Revoke a key; the machine's own key can only be rotated."""
    machine, record = _require_running(name)
    with machine.place.lock():
        removed = keys.remove(machine.place, record, which, user or record.ssh_user)
    for key in removed:
        progress.say(f"machine {machine.name}: removed {key.fingerprint} {key.comment}")


@group.command()
def rotate(name: Name) -> None:
    """Replace a running machine's own key; open sessions stay open."""
    machine, record = _require_running(name)
    if record.key != "own":
        raise StateError(f"machine {machine.name} has no key of its own: it is the project's, with the store's key")
    with machine.place.lock():
        key = keys.rotate(machine.place, record)
    sys.stdout.write(f"{key.fingerprint}\n")


def _require_running(name: str) -> tuple[Machine, MachineRecord]:
    """The machine and its record, when SSH answers. StateError when it was removed meanwhile."""
    machine = find_machine(name)
    life.wait_ready(machine.place)
    record = machine.place.record()
    if record is None:
        raise StateError(f"machine {name} was removed")
    return machine, record
