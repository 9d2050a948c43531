"""`key.path=value` from the command line, laid over a recipe's plain values before validation."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.recipe.describe import KeyPath, dotted, section_at
from trainwright.recipe.yaml_text import Document, parse_value

COMMAND_LINE = "command line"


def apply_overrides(document: Document, overrides: Iterable[str]) -> None:
    """Set each `key.path=value` in `document`, creating sections that are missing.

    The value is YAML (`1e-3`, `[a, b]`, `null`), a number in the path picks an item of a list, and
    what the file gave as an alternative of the key gives way: `training.steps=20` replaces the
    file's `tokens`. Mistakes go into `document.mistakes`.
    """
    given: set[KeyPath] = set()
    for override in overrides:
        before = deepcopy(document.value), dict(document.places)
        try:
            path, text = _parse(override)
            value = parse_value(text, COMMAND_LINE)
            section = section_at(path)
            if section is not None and isinstance(value, str) and value in section.words:
                value = section.expand(value)
            elif section is not None and section.shorthand and isinstance(value, str):
                # `optimizer=muon` names the optimizer and keeps the section's other keys.
                replaces_all = isinstance(path[-1], int)
                path = path if replaces_all else (*path, section.shorthand)
            given.add(path)
            _displace_alternatives(document, path, given)
            _set(document, path, value)
        except UserError as error:
            document.value, document.places = before
            key = override.partition("=")[0].strip() if "=" in override else ""
            document.mistakes += (replace(each, key=each.key or key) for each in error.mistakes)


def _parse(override: str) -> tuple[KeyPath, str]:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name or name.startswith("-"):
        raise UserError(
            Mistake(
                f"`{override}` is not an override",
                "write `key.path=value`, for example `training.steps=100`",
                where=COMMAND_LINE,
            )
        )
    parts = name.split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts), text


def _set(document: Document, path: KeyPath, value: Any) -> None:
    """Put `value` at `path`, making sections and lists on the way."""
    if document.value is None:
        document.value = {}
    here = document.value
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        fresh: Any = value if last else [] if isinstance(path[depth + 1], int) else {}
        if isinstance(here, list) and isinstance(part, int) and part <= len(here):
            missing = part == len(here) or here[part] is None
            if last or missing:
                here[part : part + 1] = [fresh]
        elif isinstance(here, dict) and isinstance(part, str):
            missing = here.get(part) is None
            if last or missing:
                here[part] = fresh
        else:
            raise _impossible(here, path, depth)
        if last or missing:
            _forget_places(document, dotted(path[: depth + 1]))
        here = here[part]  # type: ignore[index]


def _forget_places(document: Document, key: str) -> None:
    """What stood in the file at `key` and below it now comes from the command line."""
    for old in [place for place in document.places if f"{place}.".startswith(f"{key}.")]:
        del document.places[old]
    document.places[key] = COMMAND_LINE


def _impossible(here: Any, path: KeyPath, depth: int) -> UserError:
    around = dotted(path[:depth])
    if isinstance(here, list) and isinstance(path[depth], int):
        what = f"`{around}` has {len(here)} items, numbered from 0"
        fix = f"`{around}.{len(here)}` adds one"
    elif isinstance(here, list):
        what, fix = f"`{around}` is a list", f"pick an item of it: `{around}.0`"
    elif isinstance(here, dict):
        what, fix = f"`{around or 'the recipe'}` is not a list", "name a key instead of a number"
    else:
        what = f"`{around}` is a single value and has no `{path[depth]}`"
        fix = f"set the whole of it: `{around}=...`"
    return UserError(Mistake(what, fix, key=dotted(path), where=COMMAND_LINE))


def _displace_alternatives(document: Document, path: KeyPath, given: set[KeyPath]) -> None:
    """Drop what the file says where the command line says the contrary."""
    for depth in range(len(path)):
        section = section_at(path[:depth])
        inside = document.value
        for part in path[:depth]:
            found = isinstance(inside, dict) and part in inside
            inside = inside[part] if found else None
        if section is None or not isinstance(inside, dict):
            continue
        for group in section.alternatives:
            sides = [side.split() for side in group.split("|")]
            if not any(path[depth] in side for side in sides):
                continue
            for side in sides:
                for key in side if path[depth] not in side else ():
                    if not any(other[: depth + 1] == (*path[:depth], key) for other in given):
                        inside.pop(key, None)
