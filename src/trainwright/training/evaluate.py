"""Held-out loss and bits per byte, over all workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trainwright.data.batches import Batches
from trainwright.parallel.spread import SpreadModel
from trainwright.parallel.world import World
from trainwright.training.step import Objective, compute_context, to_tensors


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


@torch.no_grad()
def held_out_loss(
    spread: SpreadModel,
    objective: Objective,
    batches: Batches,
    world: World,
    *,
    micro_batch: int,
    precision: str,
    most_rows: int | None = None,
) -> HeldOutLoss:
    """Score `batches`, or its first `most_rows` rows, each worker its share.

    Every worker makes the same number of forward passes, as sharded weights demand; where the
    rows do not divide, some passes repeat a row without counting it.
    """
    rows = batches.rows if most_rows is None else min(batches.rows, most_rows)
    per_pass = micro_batch * world.size
    total = torch.zeros(2, dtype=torch.float64)
    training = spread.model.training
    spread.model.eval()
    try:
        for start in range(0, rows, per_pass):
            first = start + world.rank * micro_batch
            own = range(first, min(first + micro_batch, rows))
            batch = batches.read(own if len(own) else range(1))
            tensors = to_tensors(batch, 0, micro_batch, world.device)
            with compute_context(spread, precision, world.device):
                loss, targets = objective(spread.model, tensors)
            if len(own):
                total += torch.tensor([float(loss), float(targets)], dtype=torch.float64)
    finally:
        spread.model.train(training)
    loss_sum, targets = world.sum(total).tolist()
    whole = rows == batches.rows and batches.target_bytes > 0
    return HeldOutLoss(
        loss=loss_sum / max(targets, 1),
        targets=int(targets),
        bits_per_byte=loss_sum / math.log(2) / batches.target_bytes if whole else None,
    )
