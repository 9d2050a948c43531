"""Packing changes how examples lie in rows, and neither a loss nor a gradient of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assemble_here
from trainwright.data.batches import Batch
from trainwright.models.weights import load_model
from trainwright.objectives.next_token import NextToken
from trainwright.recipe.schema import Recipe

pytestmark = pytest.mark.shared


def recipe_of(shared: Path, folder: Path, packing: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": packing,
            "run_directory": str(folder / packing),
            "model": {"path": str(shared / "weights" / "stories260K_hf")},
            "tokenizer": {
                "path": str(shared / "weights" / "stories260K_hf"),
                "chat_template": "chatml",
            },
            "objective": "sft",
            "data": {
                "sources": [str(shared / "instruct" / "rasbt_instruction_data.json")],
                "sequence_length": 1024,
                "packing": packing,
                "validation": 0,
                "cache": str(folder / "cache"),
            },
            "training": {"steps": 1, "batch_sequences": 4, "precision": "fp32"},
            "parallel": {"workers": 1},
        }
    )


def tensors(batch: Batch) -> dict[str, Any]:
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    arrays = {name: getattr(batch, name) for name in names}
    return {
        name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()
    }


def gradients_of(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """The loss sum of batches, with its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        sums, _ = NextToken()(model, tensors(batch))
        sums["targets"].backward()
        total += sums["targets"].item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_real_examples_packed_are_the_same_examples_apart(shared: Path, tmp_path: Path) -> None:
    data = {}
    for packing in ("best-fit", "none"):
        made = assemble_here(recipe_of(shared, tmp_path, packing))
        made.store.close()
        data[packing] = made.trainer.data
    packed = data["best-fit"].batch(0)
    wanted = {name for row in packed.documents for name in row}
    assert len(wanted) > 12 and len(packed.input_ids) == 4
    alone = []
    for row in range(data["none"].rows):
        batch = data["none"].read(range(row, row + 1))
        if batch.documents[0][0] in wanted:
            alone.append(batch)
    assert len(alone) == len(wanted)
    assert sum(batch.weight for batch in alone) == packed.weight

    model = load_model(shared / "weights" / "stories260K_hf")
    together, gradients = gradients_of(model, [packed])
    apart, expected = gradients_of(model, alone)
    assert together == pytest.approx(apart, rel=1e-6)
    scale = max(gradient.abs().max() for gradient in expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * scale)
