"""Importing distillation, and reference scores that are taken beforehand."""

from __future__ import annotations

from pathlib import Path

from tests.recipe.test_importers import FOREIGN
from trainwright.recipe.importers import Imported, import_config
from trainwright.recipe.schema import Recipe


def kinds(result: Imported) -> dict[str, str]:
    """What became of each key."""
    return {note.key: note.kind for note in result.notes}


def test_distillation_from_a_command_line() -> None:
    words = "trl gkd --model_name_or_path a/b --teacher_model_name_or_path a/c --dataset_name d/e"
    result = import_config([*words.split(), "--beta", "0.1", "--lmbda", "0.5"])
    assert result.recipe["objective"] == {
        "kind": "distill",
        "teacher": "a/c",
        "beta": 0.1,
        "temperature": 0.9,
        "train_on": "completion",
    }
    assert kinds(result)["lmbda"] == "unsupported"  # answers of the model's own
    assert Recipe.model_validate(result.recipe).objective.mix == 0


def test_kinds_of_torchtunes_divergences(tmp_path: Path) -> None:
    text = (FOREIGN / "torchtune_distill.yaml").read_text()
    for name, beta, said in (
        ("ReverseKL", 1.0, "translated"),
        ("SymmetricKL", 0.5, "approximated"),
    ):
        other = text.replace("ForwardKL", name).replace("kd_ratio: 0.5", "kd_ratio: 0.75")
        file = tmp_path / "config.yml"
        file.write_text(other)
        result = import_config(file)
        assert result.recipe["objective"]["beta"] == beta
        assert result.recipe["objective"]["mix"] == 0.25
        assert kinds(result)["kd_loss"] == said


def test_reference_scores_taken_beforehand() -> None:
    words = "trl dpo --model_name_or_path a/b --dataset_name d/e --precompute_ref_log_probs"
    assert import_config(words.split()).recipe["objective"]["cache_reference"] is True
