"""Machines by name, of a project or of nobody's: start, use, stop, list, remove; some live only as long as a block."""

from vmtasks.machines.ephemeral import ephemeral, first_start
from vmtasks.machines.machine import Machine, Status, View
from vmtasks.machines.project import Project, Wants

__all__ = ["Machine", "Project", "Status", "View", "Wants", "ephemeral", "first_start"]
