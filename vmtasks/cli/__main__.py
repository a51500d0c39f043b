"""`python -m vmtasks.cli`: the same as `vmtasks`."""

from vmtasks.cli import main

main()
