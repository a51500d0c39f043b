"""The tasks of vmtasks: `./doit list` shows them, `./doit help_vars` the variables, config/vm.toml is what to edit."""

from vmtasks.tasks import *  # noqa: F403
from vmtasks.tasks import __all__  # noqa: F401
