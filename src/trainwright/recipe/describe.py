"""What each place of the recipe takes, read off the schema and said in words.

The error messages, the overrides and the generated reference all look here, so a type is worded in
one place only.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trainwright.recipe.schema import Recipe, Section

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """("data", "sources", 0, "path") as "data.sources.0.path"."""
    return ".".join(str(part) for part in path)


def members(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple]]:
    """The alternatives of a type, each with its constraints; None is left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        flat = [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        yield from members(inner, (*metadata, *flat))
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member, metadata)
    elif annotation is not type(None):
        yield annotation, metadata


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a place takes, if it takes one."""
    return next((member for member, _ in members(annotation) if is_section(member)), None)


def item_of(annotation: Any) -> Any:
    """The type of the items where a place takes a list, else None."""
    for member, _ in members(annotation):
        if get_origin(member) is list:
            return get_args(member)[0]
    return None


def value_of(annotation: Any) -> Any:
    """The type of the values where a place takes keys of any name, else None."""
    for member, _ in members(annotation):
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def field_at(path: KeyPath) -> FieldInfo | None:
    """The schema's field at `path`; None inside free-form places, list items and unknown keys."""
    annotation: Any = Recipe
    field = None
    for part in path:
        section = section_in(annotation)
        if isinstance(part, int):
            field, annotation = None, item_of(annotation)
        elif section is not None and part in section.model_fields:
            field = section.model_fields[part]
            annotation = field.annotation
        else:
            return None
    return field


def section_at(path: KeyPath) -> type[Section] | None:
    """The section class that lives at `path`, through lists too."""
    annotation: Any = Recipe
    for part in path:
        section = section_in(annotation)
        if isinstance(part, int):
            annotation = item_of(annotation)
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            return None
    return section_in(annotation)


def is_nullable(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def expects(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """The type in words: "a whole number above 0, or `auto`"."""
    words: list[str] = []
    for kind, found in members(annotation, metadata):
        words += _choices(kind) or [_expects_one(kind, found)]
    return _joined(words)


def _choices(kind: Any) -> list[str]:
    """The values of a type that has only a few."""
    if kind is bool:
        return ["true", "false"]
    return [f"`{value}`" for value in get_args(kind)] if get_origin(kind) is Literal else []


def _joined(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _expects_one(kind: Any, metadata: tuple[Any, ...]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    if origin is dict:
        return "keys with values"
    if is_section(kind):
        plain = ["plain text"] if kind.shorthand else [f"`{word}`" for word in kind.words]
        return ", or ".join(["a section of keys", *plain])
    words = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words[kind] + _bounds(metadata)


def _plural(annotation: Any) -> str:
    alternatives = list(members(annotation))
    choices = [word for kind, _ in alternatives for word in _choices(kind)]
    others = [_plural_one(kind, found) for kind, found in alternatives if not _choices(kind)]
    return ("any of " if choices else "") + _joined([*choices, *others])


def _plural_one(kind: Any, metadata: tuple[Any, ...]) -> str:
    if is_section(kind):
        return "sources" if kind.__name__ == "Source" else "sections"
    return {int: "whole numbers", float: "numbers", str: "texts"}[kind] + _bounds(metadata)


def _bounds(metadata: tuple[Any, ...]) -> str:
    """Constraints in words: " above 0", " from 0 to below 1"."""
    limits = {
        name: value
        for entry in metadata
        for name in ("gt", "ge", "lt", "le")
        if (value := getattr(entry, name, None)) is not None
    }
    low = f"above {limits['gt']}" if "gt" in limits else ""
    if "ge" in limits:
        closed = limits.keys() & {"lt", "le"}
        low = f"from {limits['ge']}" if closed else f"of {limits['ge']} or more"
    high = f"to below {limits['lt']}" if "lt" in limits else ""
    if "le" in limits:
        high = f"up to {limits['le']}" if "gt" in limits else f"to {limits['le']}"
    if any(getattr(entry, "pattern", None) for entry in metadata):
        return " of letters, digits, dots, dashes and underscores"
    return "".join(f" {part}" for part in (low, high) if part)
