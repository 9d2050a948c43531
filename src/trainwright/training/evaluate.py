"""Held-out loss, its figures and bits per byte, over all workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from trainwright.data.batches import Batch, Batches
from trainwright.objectives.objective import Objective, Sums
from trainwright.parallel.spread import SpreadModel
from trainwright.parallel.world import World
from trainwright.training.micro_batches import (
    counts_losses,
    counts_rows,
    score_micro_batches,
    to_tensors,
)
from trainwright.training.reference import Reference


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over a held-out set; bits per byte where the whole of a plain text was scored.

    `figures` are the objective's own, such as the share of pairs that are ranked right.
    """

    loss: float
    targets: int
    bits_per_byte: float | None
    figures: Mapping[str, float] = field(default_factory=dict)

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
    reference: Reference | None = None,
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
    totals = _Totals(objective)
    training = spread.training
    spread.train(False)
    try:
        for group in range(0, len(starts), at_once):
            counted: list[Batch | None] = []
            tensors = []
            for start in starts[group : group + at_once]:
                first = start + mesh.index("data") * micro_batch
                own = range(first, min(first + micro_batch, rows))
                batch = batches.read(own if len(own) else range(1))
                counted.append(batch if len(own) else None)
                tensors.append(to_tensors(batch, 0, micro_batch, spread, None))
            if reference is not None:
                reference.attach(objective, spread, tensors)
            scores = score_micro_batches(spread, objective, tensors)
            for of, scored in zip(counted, scores, strict=True):
                if of is not None:
                    totals.add(of, scored, spread)
    finally:
        spread.train(training)
    sums, weights = totals.shared(mesh.world)
    first = max(1, weights[objective.terms[0]])
    whole = rows == batches.rows and batches.target_bytes > 0
    return HeldOutLoss(
        loss=sum(sums[name] / max(1, weight) for name, weight in weights.items()),
        targets=weights["targets"],
        bits_per_byte=sums["targets"] / math.log(2) / batches.target_bytes if whole else None,
        figures={name: sums[name] / first for name in objective.figures},
    )


class _Totals:
    """Loss sums, figures and weights of this worker's rows."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums: dict[str, float] = {}
        self.weights: dict[str, int] = {}

    def add(self, batch: Batch, scored: tuple[Sums, Sums] | None, spread: SpreadModel) -> None:
        """Add a micro-batch: its weights where this worker speaks for them, sums where it can."""
        for name, weight in self.objective.weights(batch).items():
            self.weights[name] = self.weights.get(name, 0) + weight * counts_rows(spread)
        if scored is not None and counts_losses(spread):
            for name, each in (scored[0] | scored[1]).items():
                self.sums[name] = self.sums.get(name, 0.0) + float(each)

    def shared(self, world: World) -> tuple[dict[str, float], dict[str, int]]:
        """Sums and weights over all workers. Collective."""
        weights = [self.weights.get(name, 0) for name in self.objective.terms]
        names = [*self.objective.terms, *self.objective.figures]
        sums = [self.sums.get(name, 0.0) for name in names]
        total = world.sum(torch.tensor([*weights, *sums], dtype=torch.float64)).tolist()
        counted = dict(zip(self.objective.terms, map(int, total), strict=False))
        return dict(zip(names, total[len(weights) :], strict=True)), counted
