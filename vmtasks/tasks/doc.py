"""What `doit help TASK` says."""

import inspect
from typing import Self


class Doc(str):
    """A task's docstring: its first line where doit lists tasks, all of it in `doit help TASK`.

    doit keeps the first line of what splitlines() gives, and prints it with format() in a list and with str() in help.
    """

    __slots__ = ("text",)
    text: str

    def __new__(cls, docstring: str | None, line: str = "") -> Self:
        """`line` is what a list shows instead of the docstring's first line."""
        text = inspect.cleandoc(docstring or "")
        made = super().__new__(cls, line or text.partition("\n")[0])
        made.text = text
        return made

    def splitlines(self, keepends: bool = False) -> list[str]:  # noqa: ARG002, FBT001, FBT002 - as str has it
        """All of it as one line, for doit to keep."""
        return [self]

    def strip(self, chars: str | None = None) -> str:  # noqa: ARG002 - as str has it
        """Itself: there is nothing to strip."""
        return self

    def __format__(self, spec: str) -> str:
        """The first line."""
        return format(self[:], spec)

    def __str__(self) -> str:
        """All of it."""
        return self.text
