"""An imported recipe as YAML, with what it could not carry over said beside the keys."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainwright.recipe.describe import item_of, section_in
from trainwright.recipe.importers.job import display_name
from trainwright.recipe.importers.notes import Imported, Note
from trainwright.recipe.schema import Recipe, Section

_WIDTH = 100
# Text that YAML reads as text without quotes.
_PLAIN = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./@+-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "~"}


def to_yaml(imported: Imported) -> str:
    """The recipe, ready to be written to a file.

    Each approximation stands as a comment above its key; at the end are the keys that the recipe
    cannot express.
    """
    notes = [note for note in imported.notes if note.kind == "approximated"]
    lines = [
        f"# Made from {Path(imported.name).name} ({display_name(imported.tool)}).",
        "# Relative paths count from this file's folder.",
    ]
    told: set[tuple[str, str]] = set()
    for key, value in _ordered(imported.recipe, Recipe).items():
        if isinstance(value, dict):
            lines.append("")
        lines += _entry(key, value, key, 0, notes, told)
    lost = imported.of_kind("unsupported")
    if lost:
        lines += ["", "# Not carried over:"]
        for note in lost:
            lines += _comment(f"{note.key}: {_scalar(note.value)} — {note.reason}", 0, "#   ")
    return "\n".join(lines) + "\n"


def _ordered(tree: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """The tree with each section's keys in the schema's order."""
    result: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        if key not in tree:
            continue
        value, inner = tree[key], section_in(field.annotation)
        items = section_in(item_of(field.annotation))
        if isinstance(value, dict) and inner is not None:
            value = _ordered(value, inner)
        elif isinstance(value, list) and items is not None:
            value = [_ordered(item, items) for item in value]
        result[key] = value
    return result


def _entry(
    key: str, value: Any, path: str, depth: int, notes: list[Note], told: set[tuple[str, str]]
) -> Iterator[str]:
    """The lines of one key, its comments before it."""
    yield from _comments(path, depth, notes, told)
    indent = "  " * depth
    if isinstance(value, dict) and value:
        yield f"{indent}{_scalar(key)}:"
        for inner, item in value.items():
            yield from _entry(inner, item, f"{path}.{inner}", depth + 1, notes, told)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield f"{indent}{_scalar(key)}:"
        for index, item in enumerate(value):
            for number, (inner, part) in enumerate(item.items()):
                where = f"{path}.{index}.{inner}"
                lines = list(_entry(inner, part, where, depth + 2, notes, told))
                if number == 0:
                    # Comments stay above the dash.
                    first = next(
                        i for i, line in enumerate(lines) if "#" not in line[: 2 * depth + 5]
                    )
                    lines[first] = f"{indent}  - {lines[first].lstrip()}"
                yield from lines
    else:
        yield f"{indent}{_scalar(key)}: {_scalar(value)}"


def _comments(
    path: str, depth: int, notes: list[Note], told: set[tuple[str, str]]
) -> Iterator[str]:
    """What is approximate about the key at `path`; keys that share a reason share its comment."""
    here = [note for note in notes if note.target == path]
    for reason in dict.fromkeys(note.reason for note in here):
        if (path, reason) in told:
            continue
        told.add((path, reason))
        theirs = ", ".join(note.key for note in here if note.reason == reason)
        yield from _comment(f"{theirs}: {reason}", depth)


def _comment(text: str, depth: int, sign: str = "# ") -> list[str]:
    indent = "  " * depth + sign
    later = "  " * depth + "#   " + ("  " if sign != "# " else "")
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _scalar(value: Any) -> str:
    """A value on one line, in YAML's flow style."""
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_scalar(v)}" for k, v in value.items()) + "}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return json.dumps(text.replace("${env:", "$${env:"), ensure_ascii=False)


def _float(value: float) -> str:
    """A number as people write learning rates: 0.0002 is 2e-4."""
    if value and abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.12e}".partition("e")
        short = mantissa.rstrip("0").rstrip(".")
        if float(f"{short}e{int(exponent)}") == value:
            return f"{short}e{int(exponent)}"
    return repr(value)
