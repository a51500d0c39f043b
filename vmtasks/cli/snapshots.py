"""`vmtasks snapshot | restore | snapshots`: keep what is on a machine's disk, and go back."""

import sys
from typing import Annotated

import typer

from vmtasks.cli.common import AsJson, Name, app, machine, project, show, table


@app.command(rich_help_panel="Snapshots")
def snapshot(
    name: Name,
    tag: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its name; one of that name is replaced.")],
) -> None:
    """Save a stopped machine's disk; `vmtasks run GUEST:SNAPSHOT` makes machines from it."""
    found = machine(name)
    found.snapshot(tag)
    sys.stdout.write(f"{found.config.guest.name}:{tag}\n")


@app.command(rich_help_panel="Snapshots")
def restore(
    name: Name,
    tag: Annotated[str, typer.Argument(metavar="[SNAPSHOT]", help="By default the one it came from.")] = "",
) -> None:
    """Throw away what a machine has written, and go back to a snapshot; it is stopped then."""
    from vmtasks import progress  # noqa: PLC0415

    found = machine(name)
    image = found.restore(tag)
    progress.say(f"machine {name}: restored to {tag or 'where it came from'} ({image.digest[:12]})")


@app.command(rich_help_panel="Snapshots")
def snapshots(
    guest: Annotated[str, typer.Argument(metavar="[GUEST]", help="By default the project's guest.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the images that machines can be made from."""
    import time  # noqa: PLC0415

    from vmtasks.errors import StateError  # noqa: PLC0415
    from vmtasks.session import Machine  # noqa: PLC0415

    config = project().config(guest)
    maker = Machine(config)
    found = []
    for tag in maker.snapshots():
        try:
            image, fault = maker.find_image(tag), ""
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
