"""`vmtasks snapshot | snapshot rm | restore | snapshots`: snapshots of a machine's disk."""

import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vmtasks.cli import complete
from vmtasks.cli.common import App, AsJson, Name, app, each, find_machine, project, show, table
from vmtasks.errors import StateError
from vmtasks.host import progress
from vmtasks.machines import overlay
from vmtasks.machines.folder import Place


class SaveByDefault(TyperGroup):
    """`snapshot NAME SNAPSHOT` is `snapshot save NAME SNAPSHOT`."""

    default = "save"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default verb if there is none."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


group = App(
    cls=SaveByDefault,
    no_args_is_help=True,
    help="Save a stopped machine's disk: `vmtasks snapshot NAME SNAPSHOT`; or remove a snapshot.",
)
app.add_typer(group, name="snapshot", rich_help_panel="Snapshots")


@group.command()
def save(
    name: Name,
    tag: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its name; replaces a snapshot of that name.")],
) -> None:
    """Save a stopped machine's disk; `vmtasks run GUEST:SNAPSHOT` makes machines from it."""
    machine = find_machine(name)
    machine.snapshot(tag)
    sys.stdout.write(f"{machine.config.guest.name}:{tag}\n")


@group.command("rm")
def remove(
    images: Annotated[
        list[str], typer.Argument(metavar="GUEST:SNAPSHOT", autocompletion=complete.images, show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", "-f", help="Do not ask.")] = False,
) -> None:
    """Remove snapshots with their images, unless a machine uses them."""
    here = project()
    if not force:
        progress.confirm(f"Remove {', '.join(images)}?", "vmtasks snapshot rm --force")

    def work(image: str) -> None:
        image_removed = here.remove_snapshot(image)
        progress.say(f"snapshot {image}: removed{'' if image_removed else '; its image stays until vmtasks prune'}")

    each(list(dict.fromkeys(images)), work)


@app.command(rich_help_panel="Snapshots")
def restore(
    name: Name,
    tag: Annotated[
        str,
        typer.Argument(
            metavar="SNAPSHOT",
            help="By default the one that the machine was made from.",
            autocompletion=complete.snapshots,
        ),
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Stop a machine, discard what it has written, and restore a snapshot."""
    machine = find_machine(name)
    if not yes:
        progress.confirm(f"Discard all that machine {name} has written?", "vmtasks restore --yes", "changed")
    image = machine.restore(tag)
    progress.say(f"machine {name}: restored to {tag or 'its own snapshot'} ({image.digest[:12]})")


@app.command(rich_help_panel="Snapshots")
def snapshots(
    guest: Annotated[
        str,
        typer.Argument(metavar="GUEST", help="By default the project's guest.", autocompletion=complete.guests),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the images that machines can be made from."""
    config = project().config(guest)
    place = Place(config)
    found = []
    for tag in overlay.names(place):
        try:
            image, fault = overlay.find_image(place, tag), ""
        except StateError as error:
            image, fault = None, error.message
        found.append(
            {
                "image": f"{config.guest.name}:{tag}",
                "digest": image.digest if image else "",
                "size": image.size if image else 0,
                "created": image.created if image else 0.0,
                "fault": fault,
            }
        )
    if as_json:
        show(found)
        return
    rows = []
    for item in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(str(item["created"])))) if item["digest"] else ""
        rows.append(
            (
                str(item["image"]),
                str(item["digest"])[:12],
                f"{int(str(item['size'])) >> 20} MiB",
                made,
                str(item["fault"]),
            )
        )
    table(("IMAGE", "DIGEST", "SIZE", "CREATED", ""), rows)
