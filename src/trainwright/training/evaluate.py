"""Held-out loss and bits per byte, over all workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trainwright.data.batches import Batches
from trainwright.parallel.spread import SpreadModel
from trainwright.training.micro_batches import (
    Objective,
    counts_losses,
    score_micro_batches,
    to_tensors,
)


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over a held-out set's targets; bits per byte where the whole set was scored."""

    loss: float
    targets: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))


def held_out_loss(
    spread: SpreadModel,
    objective: Objective,
    batches: Batches,
    *,
    micro_batch: int,
    most_rows: int | None = None,
) -> HeldOutLoss:
    """Score `batches`, or its first `most_rows` rows, each worker its share. Collective.

    Every worker makes the same number of forward passes, as sharded weights demand; where the
    rows do not divide, some passes repeat a row without counting it.
    """
    mesh = spread.mesh
    rows = batches.rows if most_rows is None else min(batches.rows, most_rows)
    # Stages of a pipeline want several micro-batches on their way at once.
    at_once = max(1, spread.plan.stages)
    per_pass = micro_batch * mesh.size("data")
    starts = range(0, rows, per_pass)
    total = torch.zeros(2, dtype=torch.float64)
    training = spread.training
    spread.train(False)
    try:
        for group in range(0, len(starts), at_once):
            counted, tensors = [], []
            for start in starts[group : group + at_once]:
                first = start + mesh.index("data") * micro_batch
                own = range(first, min(first + micro_batch, rows))
                batch = batches.read(own if len(own) else range(1))
                counted.append(len(own) > 0)
                tensors.append(to_tensors(batch, 0, micro_batch, spread, None))
            scores = score_micro_batches(spread, objective, tensors)
            for counts, (loss, targets) in zip(counted, scores, strict=True):
                if counts and counts_losses(spread):
                    total += torch.tensor([float(loss), float(targets)], dtype=torch.float64)
    finally:
        spread.train(training)
    loss_sum, targets = mesh.world.sum(total).tolist()
    whole = rows == batches.rows and batches.target_bytes > 0
    return HeldOutLoss(
        loss=loss_sum / max(targets, 1),
        targets=int(targets),
        bits_per_byte=loss_sum / math.log(2) / batches.target_bytes if whole else None,
    )
