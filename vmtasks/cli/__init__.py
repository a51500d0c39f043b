"""`vmtasks ...`: machines in daily use, on the images that a project's tasks have made. Owns typer."""

from vmtasks.cli import files, jobs, keys, life, login, look, project, run, snapshots
from vmtasks.cli.common import app, main

__all__ = ["app", "files", "jobs", "keys", "life", "login", "look", "main", "project", "run", "snapshots"]

PANELS = ("Machines", "Use", "Jobs", "Look", "Snapshots", "Projects")
"""The order of `vmtasks --help`."""

app.registered_commands.sort(
    key=lambda command: (PANELS.index(str(command.rich_help_panel)), command.callback is not run.run)
)
