"""A student, a larger teacher and a packed batch of examples, for tests of distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.cases import hf_config, randomise
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.models.weights import new_model
from trainwright.objectives.build import build_objective
from trainwright.parallel.spread import whole_model
from trainwright.recipe.objective import Objective as Section
from trainwright.training.micro_batches import to_tensors
from trainwright.training.sameness import made_examples
from trainwright.training.teacher import Teacher

CPU = torch.device("cpu")


def _decoder(case: str, seed: int, **keys: Any) -> Decoder:
    torch.manual_seed(seed)
    model = new_model(decoder_config(hf_config(case) | keys))
    randomise(model)
    return model


def student() -> Decoder:
    return _decoder("llama-biases", 1)


def teacher() -> Decoder:
    """Of another family and size, whose logits are bent."""
    return _decoder("gemma2", 2)


def batch(model: Decoder) -> dict[str, Any]:
    """Six rows of packed examples, as tensors."""
    whole = made_examples(0, rows=6, sequence=48, vocabulary=60, seed=5, parts=1)
    return to_tensors(whole, 0, 6, whole_model(model, CPU), None)


def layout(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("position_ids", "segment_ids")}


def loss(
    student: Decoder, teacher: Decoder, batch: dict[str, Any], **keys: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's loss sum on the batch, and its figures."""
    section = Section.model_validate({"kind": "distill", "teacher": "somewhere", **keys})
    objective = build_objective(section)
    Teacher(whole_model(teacher, CPU)).attach(objective, whole_model(student, CPU), [batch])
    sums, figures = objective(student, batch)
    return sums["targets"], figures
