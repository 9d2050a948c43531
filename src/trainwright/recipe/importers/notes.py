"""What an import gives: a recipe, and what became of every key of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["translated", "approximated", "unsupported", "ignored"]
Tool = Literal["axolotl", "llama-factory", "torchtune", "trl"]
TOOLS: tuple[Tool, ...] = get_args(Tool)


@dataclass(frozen=True)
class Note:
    """What became of one key.

    `translated`: the recipe means the same. `approximated`: it means something near; `reason` says
    what differs. `unsupported`: the recipe cannot say it. `ignored`: there is nothing to say, since
    the key is empty, or about the other tool's own workings.

    `key` is the other tool's dotted key, `value` what it had there, `target` our dotted key (""
    where there is none) and `where` the place of `key` ("config.yml:12"; "" for a default of the
    other tool that its file does not write out).
    """

    kind: Kind
    key: str
    value: Any
    target: str = ""
    reason: str = ""
    where: str = ""


@dataclass(frozen=True)
class Imported:
    """A recipe made from another tool's configuration.

    `recipe` is a tree of plain values, as YAML would give it; it has been translated, not
    validated. `name` is the file it came from.
    """

    tool: Tool
    name: str
    recipe: dict[str, Any]
    notes: tuple[Note, ...]

    def of_kind(self, kind: Kind) -> tuple[Note, ...]:
        """The notes of one kind, in the order of the configuration."""
        return tuple(note for note in self.notes if note.kind == kind)


def leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a tree's values; an empty section or list is a value too.

    Lists of plain values count as one value.
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, Mapping | list) for item in tree):
        items = list(enumerate(tree))
    if not items:
        if prefix:
            yield prefix
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
