"""Every example and starter is a recipe that passes all checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from trainwright.models.families import new_hf_config
from trainwright.planner.check import recipe_checks
from trainwright.recipe.load import load_recipe
from trainwright.recipe.presets import PRESETS
from trainwright.recipe.starters import STARTERS, starter_summary, starter_text

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))
SAME_TEXT = {
    "quickstart": "quickstart",
    "pretrain": "pretrain",
    "continue": "continue-pretraining",
    "sft": "sft",
}


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """The examples in a folder that also has what they say the user brings."""
    folder = tmp_path / "examples"
    shutil.copytree(REPOSITORY / "examples", folder)
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    (folder / "texts" / "deep").mkdir(parents=True)
    (folder / "texts" / "deep" / "a.txt").write_text("text")
    (folder / "notes.jsonl").write_text('{"text": "a note"}\n')
    model = folder / "my-model"
    model.mkdir()
    config = new_hf_config("llama", PRESETS["llama"]["4m"], 4096)
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    return folder


@pytest.mark.parametrize("name", [file.name for file in EXAMPLES])
def test_example_passes_all_checks(name: str, examples: Path) -> None:
    load_recipe(examples / name, checks=recipe_checks)


def test_the_examples_that_are_promised_are_there() -> None:
    assert {file.stem for file in EXAMPLES} >= {
        *SAME_TEXT.values(),
        "muon",
        "mixture",
    }


@pytest.mark.parametrize("starter", STARTERS)
def test_starters_and_examples_are_one_text(starter: str) -> None:
    example = REPOSITORY / "examples" / f"{SAME_TEXT[starter]}.yaml"
    assert starter_text(starter) == example.read_text(encoding="utf-8")
    assert starter_summary(starter).endswith(".")


def test_quickstart_is_what_the_documents_say() -> None:
    recipe = load_recipe(REPOSITORY / "examples" / "quickstart.yaml", checks=recipe_checks)
    assert (recipe.name, recipe.seed, recipe.parallel.workers) == ("quickstart", 42, 2)
    assert len(recipe.evaluation.samples.prompts) == 3
    lines = starter_text("quickstart").splitlines()
    values = [line for line in lines if line.strip() and not line.rstrip().endswith(":")]
    told = [line for line in values if "#" in line or line.strip().startswith('- "')]
    assert told == values, "every line of the quickstart explains itself"
