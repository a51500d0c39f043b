"""Render *.j2 with values that are shell-quoted by default, and the generated files of a phase ISO."""

import shlex
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmtasks.config.load import show
from vmtasks.errors import ConfigError


def read(template: Path) -> str:
    """The template's source. ConfigError if it is not UTF-8, OSError if it cannot be read."""
    try:
        return template.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{show(template)}: not UTF-8: {error}") from None


def render(template: Path, values: Mapping[str, Any], text: str | None = None) -> str:
    """The template's text with each `{{ value }}` quoted as one shell word, or as several if it is a list.

    `text` is the template's source, if it was read before. `{{ value | raw }}` does not quote. A comment is
    `{{# ... #}}`, because `${#name}` is shell syntax. ConfigError with file and line if the template is invalid or
    names an undefined value.
    """
    import jinja2  # noqa: PLC0415 - 80 ms

    env = jinja2.Environment(  # noqa: S701 - shell, not HTML: `finalize` does the quoting
        undefined=jinja2.StrictUndefined,
        finalize=shell_words,
        keep_trailing_newline=True,
        comment_start_string="{{#",
        comment_end_string="#}}",
    )
    env.filters["raw"] = Raw
    try:
        return env.from_string(read(template) if text is None else text).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{show(template)}:{error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        there = ", ".join(sorted([*(set(values) - {"vars"}), *(f"vars.{name}" for name in values.get("vars", ()))]))
        raise ConfigError(
            f"{show(template)}:{_line(error)}: {error}; there is {there}", hint="values of your own come from [vars]"
        ) from None


def _line(error: Exception) -> int:
    """The template's line that raised `error`: jinja2's compiled code has the template's line numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 0 for frame in reversed(frames) if frame.filename == "<template>"), 0)


class Raw(str):
    """Text that is not quoted."""

    __slots__ = ()


def shell_words(value: Any) -> Any:
    """`value` quoted for a POSIX shell; a list becomes one word for each item."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(shell_words(item) for item in value)
    if isinstance(value, str | int):
        text = str(value)
        if "\0" in text:
            raise TypeError("a value holds a NUL byte, which no shell word can")
        return shlex.quote(text)
    from jinja2 import Undefined  # noqa: PLC0415

    if isinstance(value, Undefined):
        return value  # raises when it is written, and names the missing value
    raise TypeError(f"{value!r} is no text, number, flag or list of them")


def shipped(name: str) -> str:
    """The text of a file of this package that a guest runs: run.sh or lib.sh, for example."""
    return shipped_path(name).read_text(encoding="utf-8")


def shipped_path(name: str) -> Path:
    """The path of that file, for use as an input."""
    return Path(__file__).with_name("phase") / name
