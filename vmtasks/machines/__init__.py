"""Machines by name, with or without a project: start, use, stop, list, remove; temporary ones live for one block."""

from vmtasks.machines.machine import Machine
from vmtasks.machines.project import Project
from vmtasks.machines.spec import MachineSpec
from vmtasks.machines.state import MachineState, Status
from vmtasks.machines.temporary import first_start, temp_machine

__all__ = ["Machine", "MachineSpec", "MachineState", "Project", "Status", "first_start", "temp_machine"]
