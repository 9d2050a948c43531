"""`trainwright import` as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.conftest import REPOSITORY
from trainwright.cli.main import app
from trainwright.errors import UserError
from trainwright.recipe.load import load_recipe

FOREIGN = REPOSITORY / "tests" / "recipe" / "foreign"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["import", *map(str, arguments)])


def test_a_recipe_lies_beside_the_configuration_and_every_key_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    shutil.copy(FOREIGN / "axolotl_lora.yaml", file)
    result = run(file)
    assert result.exit_code == 0
    for heading in ("approximated: ", "unsupported: ", "ignored: ", "translated: "):
        assert heading in result.output
    assert "gradient_accumulation_steps → training.batch_sequences" in result.output
    assert "lora.yaml:28" in result.output
    recipe = load_recipe(tmp_path / "lora.recipe.yaml")
    assert recipe.objective.kind == "sft" and recipe.adapter is not None
    assert "still to be mended" in result.output  # its model is not here


def test_trl_s_command_line(tmp_path: Path) -> None:
    words = ("trl", "dpo", "--model_name_or_path", tmp_path, "--dataset_name", "pairs.jsonl")
    result = run("-o", tmp_path / "dpo.yaml", "--", *words)
    assert result.exit_code == 0, result.output
    assert load_recipe(tmp_path / "dpo.yaml").objective.kind == "dpo"


def test_nothing_is_written_over_and_a_wrong_tool_is_named(tmp_path: Path) -> None:
    file = tmp_path / "there.yaml"
    file.write_text("mine")
    source = FOREIGN / "axolotl_lora.yaml"
    refused = run(source, "-o", file).exception
    assert isinstance(refused, UserError) and "is there already" in str(refused)
    assert file.read_text() == "mine"
    refused = run(source, "--from", "trainer").exception
    assert isinstance(refused, UserError) and "llama-factory" in refused.mistakes[0].fix
    assert run(source, "-o", file, "--force").exit_code == 0


@pytest.mark.parametrize("content", ["", "just text", "a: [1"])
def test_what_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(content)
    assert isinstance(run(file).exception, UserError)
    assert not (tmp_path / "config.recipe.yaml").exists()
