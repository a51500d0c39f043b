"""Machines by name, of a project or of nobody's: start, use, stop, list, remove; some live only as long as a block."""

from vmtasks.machines.machine import Machine
from vmtasks.machines.project import Project
from vmtasks.machines.spec import MachineSpec
from vmtasks.machines.state import MachineState, Status
from vmtasks.machines.temporary import first_start, temp_machine

__all__ = ["Machine", "MachineSpec", "MachineState", "Project", "Status", "first_start", "temp_machine"]
