"""Objectives over pairs of a better and a worse answer: DPO and its kin, ORPO, CPO and SimPO.

A pair's answers are two sequences of one row, the chosen one first. The loss is the mean over the
global batch's pairs and, where chosen answers are also to be imitated, their mean cross entropy a
token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from trainwright.data.batches import IGNORED, Batch
from trainwright.objectives.log_probs import PairScores, SequenceScores, pair_scores
from trainwright.objectives.objective import Sums, Tensors
from trainwright.objectives.preference import preference_figures
from trainwright.objectives.sequences import Columns, counted_once, score_answers

FIGURES = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


@dataclass(frozen=True)
class Paired:
    """Pairs' losses, and perhaps the chosen answers' cross entropy.

    `losses` gives each pair's [pairs], None where only imitation is wanted; `rewards` are what the
    figures compare, of chosen and rejected answers.
    """

    losses: Callable[[PairScores], Tensor] | None
    rewards: Callable[[PairScores], tuple[Tensor, Tensor]]
    needs_reference: bool
    chosen_weight: float = 0.0
    columns: Columns = None
    figures: tuple[str, ...] = FIGURES

    @property
    def terms(self) -> tuple[str, ...]:
        """Pairs; tokens of chosen answers where they are imitated; trained tokens."""
        return ("pairs", "chosen", "targets") if self.chosen_weight else ("pairs", "targets")

    def weights(self, batch: Batch) -> dict[str, int]:
        """How many there are of each."""
        found = {"pairs": batch.examples, "targets": batch.weight}
        if self.chosen_weight:
            assert batch.segment_ids is not None
            found["chosen"] = int(
                np.count_nonzero((batch.labels != IGNORED) & (batch.segment_ids % 2 == 0))
            )
        return found

    def __call__(self, model: nn.Module, batch: Tensors) -> tuple[Sums, Sums]:
        """The pairs' loss sum, the chosen answers' weighted cross entropy, and the figures."""

        def of_scores(policy: SequenceScores) -> tuple[Sums, Sums]:
            reference = batch.get("reference")
            scores = pair_scores(
                policy,
                None if reference is None else SequenceScores(reference, policy.counts),
            )
            sums: Sums = {}
            if self.losses is not None:
                sums["pairs"] = self.losses(scores).where(scores.real, 0.0).sum()
            if self.chosen_weight:
                chosen = scores.policy_chosen.where(scores.real, 0.0)
                sums["chosen"] = -self.chosen_weight * chosen.sum()
            figures = preference_figures(scores, *self.rewards(scores))
            wanted = {name: figures[name] for name in self.figures}
            return counted_once(sums, self.columns), counted_once(wanted, self.columns)

        result: tuple[Sums, Sums] = score_answers(model, batch, self.columns, of_scores)
        return result
