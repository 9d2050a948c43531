"""Whatever stands in a recipe, loading it gives a recipe or mistakes; never a traceback."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainwright.errors import UserError
from trainwright.planner.check import recipe_checks
from trainwright.recipe.load import dump_recipe, load_recipe, plain_values
from trainwright.recipe.schema import Recipe
from trainwright.recipe.starters import STARTERS, starter_text

STRANGE: list[Any] = [
    None, True, 0, -1, 3, 2.5, 1e300, float("inf"), float("nan"), "", "x", "a: b", "${env:NOPE}",
    [], [1], [None], ["x", {"path": 3}], {}, {"a": 1}, {"path": "x"}, {"kind": "python-stdlib"},
    10**40, [[[]]],
]  # fmt: skip
WHOLE = plain_values(
    Recipe.model_validate(
        {
            "model": {"family": "llama", "preset": "4m", "config": {"rope_theta": 1e4}},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {"sources": [{"path": "texts.txt"}], "validation": 0.1},
            "training": {"steps": 3},
            "tracking": {"to": []},
        }
    )
)


def outcome(file: Path, *overrides: str) -> Recipe | UserError:
    try:
        return load_recipe(file, overrides, recipe_checks)
    except UserError as error:
        for mistake in error.mistakes:
            assert mistake.where, mistake
            assert mistake.what
            assert "function-" not in str(mistake)
        return error


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        below = f"{path}.{key}" if path else str(key)
        yield below
        if isinstance(item, dict | list):
            yield from key_paths(item, below)


@pytest.mark.parametrize("key", list(key_paths(WHOLE)))
def test_any_value_for_any_key(key: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    (tmp_path / "texts.txt").write_text("some text")
    for strange in STRANGE:
        tree = plain_values(Recipe.model_validate(WHOLE))
        holder = tree
        *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        for part in parents:
            holder = holder[part]  # type: ignore[index]
        holder[last] = strange  # type: ignore[index]
        text = repr(tree).replace("None", "null").replace("True", "true")
        file.write_text(text.replace(": inf", ": .inf").replace(": nan", ": .nan"))
        result = outcome(file)
        if isinstance(result, Recipe):
            again = tmp_path / "again.yaml"
            again.write_text(dump_recipe(result))
            assert load_recipe(again) == result


@pytest.mark.parametrize("starter", STARTERS)
def test_damaged_text(starter: str, tmp_path: Path) -> None:
    choose = random.Random(starter)
    text = starter_text(starter)
    file = tmp_path / "recipe.yaml"
    refused = 0
    for _ in range(60):
        damaged = text
        for _ in range(choose.randint(1, 4)):
            place = choose.randrange(len(damaged))
            length = choose.choice([0, 0, 1, 5, 40])
            new = choose.choice(
                ["", " ", "\t", "\n", ":", "- ", "'", '"', "{", "[", "&a", "*a", "é"]
            )
            damaged = damaged[:place] + new + damaged[place + length :]
        file.write_text(damaged, encoding="utf-8")
        refused += isinstance(outcome(file), UserError)
    assert refused > 25


def test_nested_without_end(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for text in ("[" * 2000, "a: " + "{b: " * 2000, "- " * 2000 + "x"):
        file.write_text(text)
        error = outcome(file)
        assert isinstance(error, UserError)
        assert "nested too deeply" in str(error)
