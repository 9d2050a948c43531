"""What objectives compare the model with: a reference's scores of the same answers.

The reference is the model as it was at the start: a second, frozen one, or the same without its
adapters. Its scores, and KTO's point of comparison, are taken before a step's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.objectives.judged import Judged
from trainwright.objectives.log_probs import SequenceScores
from trainwright.objectives.objective import Objective
from trainwright.objectives.sequences import score_answers
from trainwright.objectives.unpaired import kl_baseline, kl_sum
from trainwright.parallel.spread import SpreadModel
from trainwright.training.micro_batches import counts_losses, score_micro_batches

MicroBatch = dict[str, Tensor | None]


@dataclass(frozen=True)
class Reference:
    """A spread model to compare with; `as_it_was` makes it the reference for a while."""

    spread: SpreadModel
    as_it_was: Callable[[], AbstractContextManager] = nullcontext

    def attach(
        self, objective: Objective, policy: SpreadModel, micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Put "reference" into each micro-batch, and "baseline" where KTO asks for it. Collective.

        Only the last stage of a pipeline has scores; the baseline is everybody's.
        """
        with self.as_it_was():
            scores = score_answers_of(self.spread, micro_batches)
        for micro_batch, score in zip(micro_batches, scores, strict=True):
            micro_batch["reference"] = None if score is None else score.sums
        if isinstance(objective, Judged):
            baseline = self._baseline(policy, micro_batches, scores)
            for micro_batch in micro_batches:
                micro_batch["baseline"] = baseline

    def _baseline(
        self,
        policy: SpreadModel,
        micro_batches: Sequence[MicroBatch],
        reference: Sequence[SequenceScores | None],
    ) -> Tensor:
        mesh = policy.mesh
        total = torch.zeros(2, dtype=torch.float64, device=mesh.world.device)
        for now, before in zip(score_answers_of(policy, micro_batches), reference, strict=True):
            if now is not None and before is not None:
                apart = (each[:, 1::2] for each in (now.sums, before.sums, now.counts))
                total += torch.stack(kl_sum(*apart))
        total *= counts_losses(policy) and mesh.index("cp") == 0
        return kl_baseline(*mesh.world.sum(total).float())


def score_answers_of(
    spread: SpreadModel, micro_batches: Sequence[MicroBatch]
) -> list[SequenceScores | None]:
    """Every sequence's scores, without gradients or dropout; None but on the last stage."""
    columns = spread.mesh.group("cp")
    still = [{**each, "token_keys": None} for each in micro_batches]
    return score_micro_batches(
        spread, lambda model, batch: score_answers(model, batch, columns), still
    )
