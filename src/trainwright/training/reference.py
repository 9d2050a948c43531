"""What objectives compare the model with: a reference's scores of the same answers.

The reference is the model as it was at the start: a second, frozen one, or the same without its
adapters. Its scores, and KTO's point of comparison, are taken before a step's gradients; or the
scores were all taken before the run (`training.reference_cache`), and batches hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainwright.objectives.judged import Judged
from trainwright.objectives.log_probs import SequenceScores
from trainwright.objectives.objective import Objective
from trainwright.objectives.sequences import score_answers
from trainwright.objectives.unpaired import kl_baseline, kl_sum
from trainwright.parallel.shard import release
from trainwright.parallel.spread import SpreadModel
from trainwright.training.micro_batches import counts_losses, score_micro_batches

MicroBatch = dict[str, Any]  # tensors or None by name, and a teacher's output


class Reference(Protocol):
    """Whatever the objective compares the policy with."""

    def attach(
        self, objective: Objective, policy: SpreadModel, micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Put into each micro-batch what the objective needs beside the policy. Collective."""


@dataclass(frozen=True)
class ReferenceModel:
    """A spread model to compare with; `as_it_was` makes it the reference for a while."""

    spread: SpreadModel
    as_it_was: Callable[[], AbstractContextManager] = nullcontext

    def attach(
        self, objective: Objective, policy: SpreadModel, micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Put "reference" into each micro-batch, and "baseline" where KTO asks for it. Collective.

        Only the last stage of a pipeline has scores; the baseline is everybody's.
        """
        for micro_batch, scores in zip(micro_batches, self.scores(micro_batches), strict=True):
            micro_batch["reference"] = None if scores is None else scores.sums
        if self.spread is not policy:
            give_back(self.spread)
        attach_baseline(objective, policy, micro_batches)

    def scores(self, micro_batches: Sequence[MicroBatch]) -> list[SequenceScores | None]:
        """The reference's scores of every sequence; None but on the last stage. Collective."""
        with self.as_it_was():
            return score_answers_of(self.spread, micro_batches)


class CachedReference:
    """For batches that hold the reference's scores already."""

    def attach(
        self, objective: Objective, policy: SpreadModel, micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Put "baseline" into each micro-batch where KTO asks for it. Collective."""
        attach_baseline(objective, policy, micro_batches)


def attach_baseline(
    objective: Objective, policy: SpreadModel, micro_batches: Sequence[MicroBatch]
) -> None:
    """KTO's point of comparison, from the policy's scores and those of the reference."""
    if not isinstance(objective, Judged):
        return
    mesh = policy.mesh
    total = torch.zeros(2, dtype=torch.float64, device=mesh.world.device)
    for now, batch in zip(score_answers_of(policy, micro_batches), micro_batches, strict=True):
        if now is not None:
            reference: Tensor = batch["reference"]
            apart = (each[:, 1::2] for each in (now.sums, reference, now.counts))
            total += torch.stack(kl_sum(*apart))
    total *= counts_losses(policy) and mesh.index("cp") == 0
    baseline = kl_baseline(*mesh.world.sum(total).float())
    for batch in micro_batches:
        batch["baseline"] = baseline


def score_answers_of(
    spread: SpreadModel, micro_batches: Sequence[MicroBatch]
) -> list[SequenceScores | None]:
    """Every sequence's scores, without gradients or dropout; None but on the last stage."""
    columns = spread.mesh.group("cp")
    still = [{**each, "token_keys": None} for each in micro_batches]
    return score_micro_batches(
        spread, lambda model, batch: score_answers(model, batch, columns), still
    )


def give_back(spread: SpreadModel) -> None:
    """Give back weights that were gathered: no backward pass comes that would."""
    if spread.sharded:
        for part in spread.parts:
            release(part)
