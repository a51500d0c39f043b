"""Why a parsed TOML file does not fit its model: the key, its value, and what to write instead.

msgspec's own message names no key in a table of tables (`$.suites[...]`), one bound of two, and no choices; so the
types are walked here.
"""

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

SHOWN_CHARS = 70
"""How much of a wrong value a message repeats."""

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Fault(msgspec.Struct, frozen=True):
    """A fault at `key`. `remedy` ends the line; `value` is what the user wrote, shortened, or '' for a missing key."""

    key: str
    value: str
    remedy: str

    def __str__(self) -> str:
        """`machine.cpus = 0: use a whole number from 1 to 256`."""
        return f"{self.key} = {self.value}: {self.remedy}" if self.value else f"{self.key} {self.remedy}"


def explain(value: Any, kind: Any, keys: tuple[str | int, ...] = ()) -> Fault:
    """Find the innermost part of `value` that does not fit its type. `value` must not fit `kind`."""
    for key, part, part_kind in _parts(value, kind):
        if not _fits(part, part_kind):
            return explain(part, part_kind, (*keys, key))
    table = _table(value, kind)
    if table is None:
        for name, values in _tags(kind).items() if isinstance(value, dict) else ():
            shown = show_value(value[name]) if name in value else ""
            return Fault(
                key_path((*keys, name)), shown, f"{'use' if shown else 'is missing; use'} {' or '.join(values)}"
            )
        return Fault(key_path(keys), show_value(value), f"use {_wanted(kind)}")
    known = _names(table)
    for name in value:
        if name not in known:
            return Fault(key_path((*keys, name)), show_value(value[name]), f"unknown key; {suggest(name, known)}")
    name = next(f.encode_name for f in msgspec.structs.fields(table) if f.required and f.encode_name not in value)
    return Fault(key_path((*keys, name)), "", f"is missing; write {name} = ...")


def nul(value: Any, keys: tuple[str | int, ...] = ()) -> Fault | None:
    """Find a text or key with a NUL character: TOML has it, command lines and file names do not."""
    if isinstance(value, str) and "\0" in value:
        return Fault(key_path(keys), show_value(value), "holds a NUL character; remove it")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found = nul(key, (*keys, key)) or nul(part, (*keys, key))
        if found is not None:
            return found
    return None


def key_path(keys: Iterable[str | int]) -> str:
    """Keys as TOML writes them, on one line: `suites."a b".env`, `phases[0].name`."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += ("." if text else "") + (key if BARE_KEY.fullmatch(key) else _quoted(key))
    return text


def show_value(value: Any) -> str:
    """A value on one line, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float | list | dict) else str(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint: what the user may have meant by `name`, or the choices."""
    names = sorted(known)
    close = nearest(name, names)
    if close:
        return f"did you mean {close!r}?"
    return f"there is {', '.join(names)}" if names else "remove it"


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` that is nearest to `name`, or ''."""
    import difflib  # noqa: PLC0415 - only a mistake has use for it

    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), "")


def _quoted(key: str) -> str:
    return msgspec.json.encode(key).decode().replace("\x7f", "\\u007f")


def _members(kind: Any) -> Iterator[Any]:
    """The alternatives of a union, each with its constraints; a kind that is no union is the only one."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(bare) in (Union, types.UnionType):
        for member in get_args(bare):
            if member is not msgspec.UnsetType:
                yield from _members(member)
    else:
        yield kind


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, Union[tuple(_members(kind))])  # noqa: UP007 - made here, and without UNSET
    except msgspec.ValidationError:
        return False
    return True


def _parts(value: Any, kind: Any) -> Iterator[tuple[str | int, Any, Any]]:
    """(key, value, kind) of the parts of `value` that `kind` describes."""
    table = _table(value, kind)
    if table is not None:
        fields = {f.encode_name: f.type for f in msgspec.structs.fields(table)}
        yield from ((name, part, fields[name]) for name, part in value.items() if name in fields)
        return
    for member in _members(kind):
        bare = _bare(member)
        origin, args = get_origin(bare), get_args(bare)
        if isinstance(value, dict) and origin in (dict, Mapping):
            yield from ((name, part, args[1]) for name, part in value.items())
        elif isinstance(value, list) and origin in (list, tuple):
            yield from ((n, part, args[0]) for n, part in enumerate(value))


def _table(value: Any, kind: Any) -> type[msgspec.Struct] | None:
    """The model of a table `value`: of several, the one with its tag."""
    if not isinstance(value, dict):
        return None
    for member in map(_bare, _members(kind)):
        if isinstance(member, type) and issubclass(member, msgspec.Struct):
            tag = member.__struct_config__.tag_field
            if tag is None or (tag in value and value[tag] == member.__struct_config__.tag):
                return member
    return None


def _names(table: type[msgspec.Struct]) -> list[str]:
    tag = table.__struct_config__.tag_field
    return [f.encode_name for f in msgspec.structs.fields(table)] + ([tag] if tag else [])


def _tags(kind: Any) -> dict[str, list[str]]:
    """The tag of a union of tables, with its values."""
    found: dict[str, list[str]] = {}
    for member in map(_bare, _members(kind)):
        if isinstance(member, type) and issubclass(member, msgspec.Struct):
            config = member.__struct_config__
            if config.tag_field:
                found.setdefault(config.tag_field, []).append(_quoted(str(config.tag)))
    return found


def _wanted(kind: Any) -> str:
    """What `kind` accepts, in words for the person who edits TOML."""
    for name, values in _tags(kind).items():
        return f"a table with {name} = {' or '.join(values)}"
    return " or ".join(dict.fromkeys(map(_wanted_one, _members(kind))))


def _wanted_one(kind: Any) -> str:
    """As _wanted(), for one alternative."""
    meta = next((m for m in get_args(kind)[1:] if isinstance(m, msgspec.Meta)), msgspec.Meta())
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return " or ".join(_quoted(str(choice)) for choice in get_args(bare))
    if get_origin(bare) in (list, tuple):
        return f"a list, [...],{_counts(meta)} each {_wanted(get_args(bare)[0])}"
    text = (meta.description or f"a text that matches {meta.pattern}") if meta.pattern else "a text in quotes"
    words = {
        bool: "true or false",
        int: "a whole number" + (f" from {meta.ge} to {meta.le}" if meta.le is not None else ""),
        str: text + (", not an empty one" if meta.min_length else ""),
    }
    return words.get(bare, "a table, {...} or [...]")


def _counts(meta: msgspec.Meta) -> str:
    if meta.min_length and meta.max_length:
        return f" of {meta.min_length} to {meta.max_length} items,"
    return f" of at least {meta.min_length} items," if meta.min_length else ""
