"""Held-out loss, its figures and bits per byte, over all workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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

    `figures` are the objective's own, such as the share of pairs that are ranked right. `sources`
    has the same of each source's part, where the set is of several.
    """

    loss: float
    targets: int
    bits_per_byte: float | None
    figures: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, HeldOutLoss] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, Any]:
        """What is written of it, without the sources."""
        own = {"loss": self.loss, "targets": self.targets, "bits_per_byte": self.bits_per_byte}
        return {**own, **self.figures}

    def named(self, name: str) -> Iterator[tuple[str, HeldOutLoss]]:
        """The whole as `name`, then each source's part as `name/source`."""
        yield name, self
        for source, part in self.sources.items():
            yield f"{name}/{source}", part


def held_out_loss(
    spread: SpreadModel,
    objective: Objective,
    batches: Batches,
    *,
    micro_batch: int,
    most_rows: int | None = None,
    reference: Reference | None = None,
) -> HeldOutLoss:
    """Score `batches`, or `most_rows` of its rows, each worker its share. Collective.

    Of several sources each gives rows of its own, as many as is its share, so that the parts' sums
    are exact, and so is the whole's. Every worker makes the same number of forward passes, as
    sharded weights demand; where the rows do not divide, some passes repeat a row without counting
    it.
    """
    mesh = spread.mesh
    parts = batches.by_source() or {"": batches}
    rows = [_rows_of(part, batches.rows, most_rows) for part in parts.values()]
    # Stages of a pipeline want several micro-batches on their way at once.
    at_once = max(1, spread.plan.stages)
    per_pass = micro_batch * mesh.size("data")
    totals_of = [_Totals(objective) for _ in parts]
    passes = [
        (part, totals, start, most)
        for part, totals, most in zip(parts.values(), totals_of, rows, strict=True)
        for start in range(0, most, per_pass)
    ]
    training = spread.training
    spread.train(False)
    try:
        for group in range(0, len(passes), at_once):
            counted: list[Batch | None] = []
            tensors = []
            together = passes[group : group + at_once]
            for part, _, start, most in together:
                first = start + mesh.index("data") * micro_batch
                own = range(first, min(first + micro_batch, most))
                batch = part.read(own if len(own) else range(1))
                counted.append(batch if len(own) else None)
                tensors.append(to_tensors(batch, 0, micro_batch, spread, None))
            if reference is not None:
                reference.attach(objective, spread, tensors)
            scores = score_micro_batches(spread, objective, tensors)
            for (_, totals, *_), of, scored in zip(together, counted, scores, strict=True):
                if of is not None:
                    totals.add(of, scored, spread)
    finally:
        spread.train(training)
    for totals in totals_of:
        totals.share(mesh.world)
    results = [
        totals.result(part, whole=most == part.rows)
        for part, totals, most in zip(parts.values(), totals_of, rows, strict=True)
    ]
    if len(parts) == 1:
        return results[0]
    total = sum(totals_of, _Totals(objective)).result(batches, whole=sum(rows) == batches.rows)
    return replace(total, sources=dict(zip(parts, results, strict=True)))


def batch_loss(
    spread: SpreadModel, objective: Objective, batch: Batch, *, micro_batch: int
) -> float:
    """The loss of a batch of which `batch` has this worker's rows, as in training. Collective."""
    training, at_once = spread.training, max(1, spread.plan.stages)
    starts = range(0, len(batch.input_ids), micro_batch)
    parts = [to_tensors(batch, start, start + micro_batch, spread, None) for start in starts]
    scores: list[tuple[Sums, Sums] | None] = []
    spread.train(False)
    try:
        for first in range(0, len(parts), at_once):
            scores += score_micro_batches(spread, objective, parts[first : first + at_once])
    finally:
        spread.train(training)
    totals = _Totals(objective)
    for number, scored in enumerate(scores):
        totals.add(batch, scored, spread, counts=number == 0)
    totals.share(spread.mesh.world)
    return sum(totals.sums[name] / max(1, weight) for name, weight in totals.weights.items())


def _rows_of(part: Batches, all_rows: int, most_rows: int | None) -> int:
    """Rows of a part to score, where `most_rows` of `all_rows` are wanted: its share."""
    if most_rows is None or most_rows >= all_rows:
        return part.rows
    return max(1, most_rows * part.rows // all_rows)


class _Totals:
    """Loss sums, figures and weights of this worker's rows."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums: dict[str, float] = {}
        self.weights: dict[str, int] = {}

    def add(
        self,
        batch: Batch,
        scored: tuple[Sums, Sums] | None,
        spread: SpreadModel,
        *,
        counts: bool = True,
    ) -> None:
        """Add a micro-batch: its weights where this worker speaks for them, sums where it can.

        `counts` is False where the weights of `batch` have been added already.
        """
        for name, weight in self.objective.weights(batch).items():
            own = weight * counts_rows(spread) * counts
            self.weights[name] = self.weights.get(name, 0) + own
        if scored is not None and counts_losses(spread):
            for name, each in (scored[0] | scored[1]).items():
                self.sums[name] = self.sums.get(name, 0.0) + float(each)

    def share(self, world: World) -> None:
        """Take in what the other workers have. Collective."""
        names = [*self.objective.terms, *self.objective.figures]
        weights = [self.weights.get(name, 0) for name in self.objective.terms]
        sums = [self.sums.get(name, 0.0) for name in names]
        total = world.sum(torch.tensor([*weights, *sums], dtype=torch.float64)).tolist()
        self.weights = dict(zip(self.objective.terms, map(int, total), strict=False))
        self.sums = dict(zip(names, total[len(weights) :], strict=True))

    def __add__(self, other: _Totals) -> _Totals:
        both = _Totals(self.objective)
        for name in {**self.weights, **other.weights}:
            both.weights[name] = self.weights.get(name, 0) + other.weights.get(name, 0)
        for name in {**self.sums, **other.sums}:
            both.sums[name] = self.sums.get(name, 0.0) + other.sums.get(name, 0.0)
        return both

    def result(self, batches: Batches, *, whole: bool) -> HeldOutLoss:
        """The means; `whole` says that all of `batches` has been scored."""
        first = max(1, self.weights[self.objective.terms[0]])
        bits = None
        if whole and batches.target_bytes > 0:
            bits = self.sums["targets"] / math.log(2) / batches.target_bytes
        return HeldOutLoss(
            loss=sum(self.sums[name] / max(1, weight) for name, weight in self.weights.items()),
            targets=self.weights["targets"],
            bits_per_byte=bits,
            figures={name: self.sums[name] / first for name in self.objective.figures},
        )
