"""A recipe's file to a finished `Recipe`, with every mistake in one report.

The way: YAML → plain values with lines → overrides → paths → sections → checks.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from trainwright.errors import Mistake, UserError
from trainwright.recipe.describe import is_nullable, item_of, section_in
from trainwright.recipe.mistakes import mistakes_from, show
from trainwright.recipe.overrides import COMMAND_LINE, apply_overrides
from trainwright.recipe.paths import resolve_paths
from trainwright.recipe.schema import (
    Adapter,
    Checkpoint,
    DataSection,
    Evaluation,
    Export,
    ModelSection,
    Objective,
    Optimizer,
    Parallel,
    Recipe,
    Schedule,
    Section,
    Swarm,
    TokenizerSection,
    Tracking,
    Training,
)
from trainwright.recipe.yaml_text import Document, parse

_LARGEST_FILE = 10_000_000


@dataclass(frozen=True)
class Draft:
    """A recipe whose parts may be broken: each broken one is None and named in `broken`.

    `tokenizer`, `adapter`, `cluster`, `swarm` and `run_directory` are also None where they are
    simply left out.
    """

    name: str | None = None
    seed: int | None = None
    run_directory: Path | None = None
    model: ModelSection | None = None
    tokenizer: TokenizerSection | None = None
    data: DataSection | None = None
    objective: Objective | None = None
    adapter: Adapter | None = None
    training: Training | None = None
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    parallel: Parallel | None = None
    cluster: Path | None = None
    swarm: Swarm | None = None
    checkpoint: Checkpoint | None = None
    evaluation: Evaluation | None = None
    tracking: Tracking | None = None
    export: Export | None = None
    broken: frozenset[str] = frozenset()


Check = Callable[[Draft], Iterable[Mistake]]


def load_recipe(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    checks: Sequence[Check] = (),
    *,
    text: str | None = None,
) -> Recipe:
    """Read the recipe at `path`, lay `key.path=value` overrides over it and check it.

    Relative paths in the file count from the file's folder, those on the command line from the
    current folder, and `run_directory` always from the current folder. `checks` see the sections
    that are whole even where others are broken. `text` is taken instead of what `path` holds.

    Raises `UserError` with every mistake found, each with its line.
    """
    path = Path(path)
    document = parse(_read(path) if text is None else text, str(path))
    if document.value is None and not overrides:
        raise UserError(
            Mistake(
                "the recipe is empty",
                "`trainwright init quickstart` writes one to start from",
                where=str(path),
            )
        )
    if not isinstance(document.value, dict | None):
        raise UserError(
            Mistake(
                f"a recipe is a section of keys, found {show(document.value)}",
                "begin with `model:`, `data:` and `training:`",
                where=f"{path}:1",
            )
        )
    _expand_shorthands(document.value, Recipe)
    apply_overrides(document, overrides)
    return _finish(document, path, checks)


def _finish(document: Document, path: Path, checks: Sequence[Check]) -> Recipe:
    tree = document.value if document.value is not None else {}
    _expand_shorthands(tree, Recipe)
    resolve_paths(tree, document, path.parent)
    mistakes = list(document.mistakes)
    recipe = None
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found = mistakes_from(error.errors(include_url=False))
        mistakes += (mistake for mistake in found if not _follows_from_unfilled(mistake, document))
    draft = _draft(tree)
    for check in checks:
        try:
            mistakes += check(draft)
        except UserError as error:
            mistakes += error.mistakes
    if mistakes or recipe is None:
        raise UserError(_in_order(_place(mistakes, document, path), str(path)))
    return recipe


def _follows_from_unfilled(mistake: Mistake, document: Document) -> bool:
    """Whether the key, or one in its section, only lacks its environment variable."""
    return any(f"{key}.".startswith(f"{mistake.key}.") for key in document.unfilled)


def _read(path: Path) -> str:
    """The file's text, or a `UserError` that says why there is none."""
    try:
        if path.is_dir():
            found = ", ".join(f"`{each.name}`" for each in _recipes_in(path)[:5])
            raise UserError(
                Mistake(
                    "this is a directory, not a recipe",
                    f"name a file in it, such as {found}" if found else "name a YAML file",
                    where=str(path),
                )
            )
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(Mistake("the file is far too large for a recipe", where=str(path)))
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(Mistake(f"cannot be read: {reason}", where=str(path))) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        text = "\0"
        where = f"{path}:{line}"
    else:
        where = str(path)
    if "\0" in text:
        raise UserError(
            Mistake("this is not a text file in UTF-8", "a recipe is YAML text", where=where)
        )
    return text


def _missing(path: Path) -> Mistake:
    others = [each.name for each in _recipes_in(path.parent)]
    close = difflib.get_close_matches(path.name, others, n=1, cutoff=0.5)
    fix = "`trainwright init quickstart` writes a recipe to start from"
    if close:
        fix = f"did you mean `{path.parent / close[0]}`?"
    elif others:
        fix = "recipes there: " + ", ".join(f"`{name}`" for name in others[:5])
    elif not path.parent.is_dir():
        fix = f"there is no folder `{path.parent}` either"
    return Mistake("there is no such file", fix, where=str(path))


def _recipes_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if each.suffix in (".yaml", ".yml"))


def _expand_shorthands(tree: Any, section: type[Section]) -> None:
    """Plain strings to the sections they stand for; sections left empty as if left out."""
    if not isinstance(tree, dict):
        return
    for key, value in list(tree.items()):
        field = section.model_fields.get(key)
        if field is None:
            continue
        inner = section_in(field.annotation)
        if inner is not None and value is None and not is_nullable(field):
            del tree[key]
        elif inner is not None:
            tree[key] = _expanded(value, inner)
        elif isinstance(value, list) and (inner := section_in(item_of(field.annotation))):
            tree[key] = [_expanded(item, inner) for item in value]


def _expanded(value: Any, section: type[Section]) -> Any:
    value = section.expand(value)
    _expand_shorthands(value, section)
    return value


def _draft(tree: Mapping[str, Any]) -> Draft:
    """Each top-level part by itself, so that one broken part does not hide the others."""
    parts: dict[str, Any] = {}
    broken = set()
    for name, field in Recipe.model_fields.items():
        try:
            if name in tree:
                kind: Any = Annotated[field.annotation, field]
                part = TypeAdapter(kind).validate_python(tree[name])
            elif field.is_required():
                broken.add(name)
                continue
            else:
                part = field.get_default(call_default_factory=True)
            parts[name] = part
        except ValidationError:
            broken.add(name)
    return Draft(**parts, broken=frozenset(broken))


def _place(mistakes: Iterable[Mistake], document: Document, path: Path) -> Iterator[Mistake]:
    """Give each mistake that has a key but no place the line of that key."""
    for mistake in mistakes:
        where = mistake.where or document.place(mistake.key) or str(path)
        yield replace(mistake, where=where)


def _in_order(mistakes: Iterable[Mistake], name: str) -> list[Mistake]:
    """Each mistake once: the recipe's by line, then the command line's, then other files'."""

    def rank(mistake: Mistake) -> tuple[int, int]:
        file, _, line = mistake.where.rpartition(":")
        if file == name and line.isdecimal():
            return 0, int(line)
        return (1 if mistake.where == COMMAND_LINE else 2), 0

    return sorted(dict.fromkeys(mistakes), key=rank)


def plain_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values, without the keys that are null by default."""

    def strip(section: Section, values: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in values.items():
            inner = getattr(section, key)
            if value is None and type(section).model_fields[key].default is None:
                continue
            if isinstance(inner, Section):
                value = strip(inner, value)
            elif isinstance(inner, list | tuple):
                value = [
                    strip(item, plain) if isinstance(item, Section) else plain
                    for item, plain in zip(inner, value, strict=True)
                ]
            kept[key] = value
        return kept

    return strip(recipe, recipe.model_dump(mode="json"))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults written out; loading it gives an equal recipe."""

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [escape(item) for item in value]
        return value.replace("${env:", "$${env:") if isinstance(value, str) else value

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    stream = StringIO()
    yaml.dump(escape(plain_values(recipe)), stream)
    return stream.getvalue()


def different_keys(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys whose values differ between two recipes, in the schema's order."""

    def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list) and value:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                yield from leaves(item, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    first = dict(leaves(a.model_dump(mode="json"), ""))
    second = dict(leaves(b.model_dump(mode="json"), ""))
    keys = dict.fromkeys([*first, *second])
    absent = object()
    return [key for key in keys if first.get(key, absent) != second.get(key, absent)]
