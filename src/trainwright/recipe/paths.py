"""Which values of a recipe are paths, and from which folder each one counts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainwright.recipe.describe import KeyPath, dotted
from trainwright.recipe.overrides import COMMAND_LINE
from trainwright.recipe.yaml_text import Document

_FILE_KINDS = ("text", "jsonl", "parquet", "arrow")
# Sections' keys that name a directory, or something on the hub or of our own.
_NAMES = (
    *(("model", "path"), ("tokenizer", "path"), ("tokenizer", "chat_template")),
    *(("objective", "reference"), ("objective", "teacher"), ("adapter", "path")),
)
# "owner/name", unless it ends as files do.
_HUB_ID = re.compile(r"[\w-][\w.-]*/(?![\w.-]*\.[A-Za-z]+$)[\w.-]+")


@dataclass(frozen=True)
class _Place:
    """A key that holds a path: always (`folder`), or perhaps a name on the Hugging Face hub."""

    holder: dict[str, Any]
    key: str
    path: KeyPath
    role: Literal["folder", "name", "source"]


def resolve_paths(tree: dict[str, Any], document: Document, folder: Path) -> None:
    """Make the paths in `tree` absolute, each from where it was written.

    Paths in the file count from its `folder`, those on the command line from the current folder,
    and `run_directory` always from the current folder. `model.path` and other names of things on
    the hub stay as they are unless they are spelt as a path or such a directory is there.
    """
    for place in _places(tree):
        value = place.holder.get(place.key)
        if not isinstance(value, str) or "://" in value:
            continue
        typed = document.place(dotted(place.path)) == COMMAND_LINE or place.key == "run_directory"
        absolute = Path.cwd() / (Path() if typed else folder) / Path(value).expanduser()
        if _is_local(value, absolute, place):
            # normpath, since resolve() would follow links that the user knows by name.
            place.holder[place.key] = os.path.normpath(absolute)


def _places(tree: dict[str, Any]) -> Iterator[_Place]:
    yield _Place(tree, "run_directory", ("run_directory",), "folder")
    yield _Place(tree, "cluster", ("cluster",), "folder")
    for name, key in _NAMES:
        if isinstance(tree.get(name), dict):
            yield _Place(tree[name], key, (name, key), "name")
    evaluation = tree.get("evaluation")
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    for index, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict):
            yield _Place(task, "path", ("evaluation", "tasks", index, "path"), "folder")
    data = tree.get("data")
    if isinstance(data, dict):
        yield _Place(data, "cache", ("data", "cache"), "folder")
        for name in ("sources", "validation"):
            sources = data.get(name)
            for index, source in enumerate(sources if isinstance(sources, list) else ()):
                if isinstance(source, dict):
                    yield _Place(source, "path", ("data", name, index, "path"), "source")


def _is_local(value: str, absolute: Path, place: _Place) -> bool:
    if place.role == "folder" or is_spelt_as_path(value):
        return True
    if place.role == "name":
        return value != "bytes" and absolute.exists()
    kind = place.holder.get("kind")
    if kind in _FILE_KINDS or absolute.exists():
        return True
    return kind is None and not _HUB_ID.fullmatch(value)


def is_spelt_as_path(value: str) -> bool:
    """Whether `value` can only mean a place on this disk."""
    return value.startswith(("/", "./", "../", "~")) or value in (".", "..")
