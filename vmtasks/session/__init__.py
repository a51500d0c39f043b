"""Machines by name, of a project or of nobody's: start, use, stop, list, remove; some live only as long as a block."""

from vmtasks.session.ephemeral import ephemeral, first_start
from vmtasks.session.machine import Machine, Status, View
from vmtasks.session.project import Project, Wants

__all__ = ["Machine", "Project", "Status", "View", "Wants", "ephemeral", "first_start"]
