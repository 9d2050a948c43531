"""Importing other tools' configurations: whole examples, written from the tools' documented keys.

What each should become was worked out by hand from the tools' documentation and stands below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recipe.expected_imports import LOST, PARTS, WHOLE
from trainwright.recipe.importers import Imported, import_config, to_yaml
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.recipe.yaml_text import parse

FOREIGN = Path(__file__).parent / "foreign"
EXAMPLES = sorted(each.name for each in FOREIGN.iterdir() if each.name != "dataset_info.json")


def imported(name: str) -> Imported:
    return import_config(FOREIGN / name)


def values_in(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all that is not a section with keys, or a list of sections."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from values_in(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from values_in(value, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix(".")


def test_there_are_ten_of_the_two() -> None:
    of_two = [name for name in EXAMPLES if name.startswith(("axolotl", "llama_factory"))]
    assert len(of_two) >= 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_has_a_note(name: str) -> None:
    result = imported(name)
    noted = {note.key for note in result.notes}
    if not name.endswith(".yaml"):
        return  # command lines: see test_importers_commands.py
    tree = parse((FOREIGN / name).read_text(), name).value
    for key in values_in(tree):
        parts = key.split(".")
        around = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
        assert around & noted, f"{key} is told of nowhere"


@pytest.mark.parametrize("name", EXAMPLES)
def test_notes_name_the_line_and_say_why(name: str) -> None:
    text = (FOREIGN / name).read_text().splitlines()
    for note in imported(name).notes:
        if note.kind in ("approximated", "unsupported", "ignored"):
            assert note.reason
        if note.kind in ("translated", "approximated"):
            assert note.target
        file, _, line = note.where.rpartition(":")
        if file and line.isdecimal():
            last = note.key.rpartition(".")[2]
            assert last in text[int(line) - 1] or (last.isdecimal() and "-" in text[int(line) - 1])


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_valid_recipe(name: str) -> None:
    Recipe.model_validate(imported(name).recipe)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_is_what_was_imported(name: str, tmp_path: Path) -> None:
    result = imported(name)
    text = to_yaml(result)
    assert parse(text, "recipe.yaml").value == result.recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    loaded = load_recipe(file)
    assert loaded.objective == Recipe.model_validate(result.recipe).objective
    assert max(len(line) for line in text.splitlines()) < 130


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_says_what_is_lost(name: str) -> None:
    result = imported(name)
    comments = " ".join(
        line.strip().lstrip("# ") for line in to_yaml(result).splitlines() if "#" in line
    )
    for note in result.of_kind("unsupported"):
        assert note.key in comments
        assert note.reason in comments
    for note in result.of_kind("approximated"):
        assert note.key in comments


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_recipe_by_hand(name: str) -> None:
    assert imported(name).recipe == WHOLE[name]


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree.get(part)
        if tree is None:
            return None
    return tree


@pytest.mark.parametrize(("name", "key", "value"), PARTS)
def test_parts_by_hand(name: str, key: str, value: Any) -> None:
    assert at(imported(name).recipe, key) == value


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_carried_over_by_hand(name: str) -> None:
    assert {note.key for note in imported(name).of_kind("unsupported")} == LOST[name]


def test_a_key_that_nobody_knows() -> None:
    notes = {note.key: note for note in imported("llama_factory_pretrain.yaml").notes}
    note = notes["wandb_watch_everything"]
    assert (note.kind, note.reason, note.value) == ("unsupported", "not known", True)
    assert note.where.endswith("llama_factory_pretrain.yaml:21")


def test_axolotl_s_reward_models(tmp_path: Path) -> None:
    file = tmp_path / "reward.yml"
    file.write_text(
        "base_model: a/b\nreward_model: true\ncenter_rewards_coefficient: 0.02\n"
        "learning_rate: 1e-5\ndatasets: [{path: d, type: bradley_terry.chat_template}]\n"
    )
    recipe = import_config(file).recipe
    assert recipe["objective"] == {"kind": "reward", "center": 0.02}
    assert recipe["data"]["sources"] == [{"path": "d", "format": "preference"}]
