"""Render *.j2 with values that are shell-quoted by default, and the generated files of a phase ISO."""

import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vmtasks.errors import ConfigError


def render(template: Path, values: Mapping[str, Any]) -> str:
    """The template's text with each `{{ value }}` quoted as one shell word, or as several if it is a list.

    `{{ value | raw }}` leaves it as it is. ConfigError with file and line when the template is wrong or names a value
    that does not exist.
    """
    import jinja2  # noqa: PLC0415 - 80 ms

    env = jinja2.Environment(  # noqa: S701 - shell, not HTML: `finalize` does the quoting
        undefined=jinja2.StrictUndefined, finalize=shell_words, keep_trailing_newline=True
    )
    env.filters["raw"] = Raw
    try:
        return env.from_string(template.read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{template}:{error.lineno}: {error.message}") from None
    except (jinja2.UndefinedError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(
            f"{template}: {error}; there is {', '.join(sorted(values))}", hint="values come from [vars]"
        ) from None


class Raw(str):
    """Text that is not quoted."""

    __slots__ = ()


def shell_words(value: Any) -> Any:
    """What a template writes for `value`: quoted for a POSIX shell; a list becomes one word for each item."""
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
    return value  # jinja2's own Undefined raises when it is written


def shipped(name: str) -> str:
    """A file of the phase contract that comes with the package: run.sh or lib.sh."""
    return resources.files("vmtasks.media").joinpath("phase", name).read_text(encoding="utf-8")
