"""The schema for others: docs/recipe.md is what the generator writes, editors get a JSON schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY
from trainwright.recipe.schema import Recipe
from trainwright.recipe.schema_export import json_schema, reference_markdown


def test_the_reference_page_is_up_to_date(tmp_path: Path) -> None:
    page = REPOSITORY / "docs" / "recipe.md"
    command = "python -m trainwright.recipe.schema_export docs/recipe.md"
    assert page.read_text(encoding="utf-8") == reference_markdown(), f"run `{command}`"
    assert command in reference_markdown()
    written = tmp_path / "recipe.md"
    subprocess.run(
        [sys.executable, "-m", "trainwright.recipe.schema_export", str(written)], check=True
    )
    assert written.read_text(encoding="utf-8") == reference_markdown()


def test_the_reference_page_has_every_key_once_a_section() -> None:
    text = reference_markdown()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    sections = {part.splitlines()[0].strip("`"): part for part in parts}
    for name, field in Recipe.model_fields.items():
        assert f"| `{name}` |" in sections["Top level"]
        keys = getattr(field.annotation, "model_fields", {})
        for key in keys:
            assert sections[name].count(f"| `{key}` |") == 1
    for nested in ("tokenizer.train", "data.sources[]", "evaluation.samples"):
        assert nested in sections
    for anchor in re.findall(r"\]\(#(\w+)\)", text):
        assert anchor in {re.sub(r"[^\w]", "", name) for name in sections}


def test_json_schema_is_closed_described_and_allows_shorthands() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["required"] == ["model", "training"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)

    for name, definition in schema["$defs"].items():
        choices = definition.get("anyOf", [definition])
        section = choices[-1]
        assert section["additionalProperties"] is False
        plain = name in {"TokenizerSection", "Source", "Optimizer", "Schedule", "Objective", "Task"}
        assert ({"type": "string"} in choices) is plain
        for field in section["properties"].values():
            assert field["description"] or "$ref" in field

    optimizer = schema["$defs"]["Optimizer"]["anyOf"][-1]["properties"]
    assert optimizer["name"]["enum"] == [
        *("adamw", "muon", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
    ]
    assert optimizer["learning_rate"]["exclusiveMinimum"] == 0
