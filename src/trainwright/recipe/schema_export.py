"""The recipe's schema for others: a JSON schema for editors, and the reference page.

`python -m trainwright.recipe.schema_export docs/recipe.md` writes the page anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from trainwright.files import write_atomically
from trainwright.recipe.describe import expects, item_of, section_in
from trainwright.recipe.schema import Recipe, Section
from trainwright.recipe.starters import starter_text

_INTRODUCTION = """\
# The recipe

<!-- Written by `python -m trainwright.recipe.schema_export docs/recipe.md`; do not edit. -->

A recipe is one YAML file that says what to train, on what, and for how long. Everything has a
default but `model` and `training`; how the work is spread follows from the machine.

```yaml
{example}```

`trainwright validate recipe.yaml` reports every mistake with its line and what to write instead;
`trainwright train recipe.yaml` trains. `trainwright init --list` lists starters to write from.

## How it is read

- **YAML 1.2.** `3e-4` and `1_700_000` are numbers; `yes` and `off` are text. Keys that do not exist
  and keys given twice are mistakes. `<<: *anchor` merges sections.
- **Overrides.** `trainwright train recipe.yaml training.steps=20 optimizer=muon` changes keys for
  one run. A value is YAML, a number picks an item of a list (`data.sources.0.path=books.txt`), and
  `null` takes an optional key away. A key given on the command line displaces the alternatives in
  the file: `training.steps=20` replaces the file's `tokens`.
- **Paths.** Relative paths count from the recipe's folder, those on the command line from the
  current folder, and `run_directory` always from the current folder. `~` is your home. `model.path`
  and `tokenizer.path` name something on the Hugging Face hub unless such a directory is there.
- **Environment.** `${{env:NAME}}` stands for an environment variable, `${{env:NAME:-default}}`
  gives a default, and `$${{env:` stands for itself.

## Help from your editor

`trainwright validate --schema > recipe.schema.json` writes a JSON schema. Editors that speak
yaml-language-server (VS Code with the YAML extension, Neovim, Emacs, IntelliJ) then complete and
check keys as you type, with this as the recipe's first line:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```
"""


def json_schema() -> dict[str, Any]:
    """The recipe as a JSON schema (2020-12), plain strings allowed where the recipe allows them."""
    schema = Recipe.model_json_schema()
    sections = {section.__name__: section for _, section in _sections()}
    for name, definition in schema["$defs"].items():
        if sections[name].shorthand:
            described = {"description": definition.pop("description", "")}
            schema["$defs"][name] = {**described, "anyOf": [{"type": "string"}, definition]}
        elif sections[name].words:
            described = {"description": definition.pop("description", "")}
            words = {"enum": list(sections[name].words)}
            schema["$defs"][name] = {**described, "anyOf": [words, definition]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Trainwright recipe",
        **{key: value for key, value in _untitled(schema).items() if key != "title"},
    }


def reference_markdown() -> str:
    """The reference page: an example, how a recipe is read, and every key of every section."""
    parts = [_INTRODUCTION.format(example=starter_text("pretrain"))]
    parts += [_section_markdown(path, section) for path, section in _sections()]
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, type[Section]]]:
    """Every section with the key it stands under, outer before inner, each class once."""
    seen: set[type[Section]] = set()

    def walk(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
        if section in seen:
            return
        seen.add(section)
        yield path, section
        for key, field in section.model_fields.items():
            inner, item = section_in(field.annotation), section_in(item_of(field.annotation))
            below = f"{path}.{key}" if path else key
            if inner is not None:
                yield from walk(below, inner)
            elif item is not None:
                yield from walk(f"{below}[]", item)

    yield from walk("", Recipe)


def _section_markdown(path: str, section: type[Section]) -> str:
    title = f"`{path}`" if path else "Top level"
    lines = [f"## {title}", "", cleandoc(section.__doc__ or ""), ""]
    for group in section.alternatives:
        sides = [" with ".join(f"`{key}`" for key in side.split()[:2]) for side in group.split("|")]
        lines += [f"Give one of {', '.join(sides[:-1])} and {sides[-1]}.", ""]
    lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        takes = expects(field.annotation, tuple(field.metadata))
        below = f"{path}.{key}".strip(".")
        if section_in(field.annotation) is not None:
            takes = takes.replace("a section of keys", f"a [section](#{below.replace('.', '')})")
        elif section_in(item_of(field.annotation)) is not None:
            takes = takes.replace("sources", "[sources](#datasources)")
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {takes} | {_default(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, Section):
        return f"`{value.words[0]}`" if value.words else "its own defaults"
    if isinstance(value, list) and value and isinstance(value[0], Section):
        return "`[python-stdlib]`"
    text = json.dumps(list(value)) if isinstance(value, tuple) else json.dumps(value)
    return f"`{text.strip(chr(34))}`"


def _untitled(value: Any) -> Any:
    """Without pydantic's titles, which only repeat the keys."""
    if isinstance(value, dict):
        return {
            key: _untitled(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    return [_untitled(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), reference_markdown())
