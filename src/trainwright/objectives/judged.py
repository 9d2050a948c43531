"""Objectives over single answers marked good or bad: KTO.

Each example has two sequences: the answer, and one that belongs to another prompt, from which the
point of comparison is taken: how far the policy is from the reference on answers to nothing. That
is one number for the whole global batch, which the trainer takes beforehand ("baseline").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trainwright.data.batches import Batch
from trainwright.objectives.log_probs import SequenceScores
from trainwright.objectives.objective import Sums, Tensors
from trainwright.objectives.sequences import Columns, counted_once, score_answers
from trainwright.objectives.unpaired import unpaired_figures, unpaired_losses


@dataclass(frozen=True)
class Judged:
    """KTO's loss, the mean over the global batch's answers."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    columns: Columns = None
    needs_reference: bool = True
    terms: tuple[str, ...] = ("answers", "targets")
    figures: tuple[str, ...] = ("rewards/chosen", "rewards/rejected")

    def weights(self, batch: Batch) -> dict[str, int]:
        """Answers, and trained tokens."""
        return {"answers": batch.examples, "targets": batch.weight}

    def __call__(self, model: nn.Module, batch: Tensors) -> tuple[Sums, Sums]:
        """The answers' loss sum, and their rewards."""

        def of_scores(policy: SequenceScores) -> tuple[Sums, Sums]:
            # Only where the head is: the other stages of a pipeline have no reference's scores.
            reference, labels, baseline = batch["reference"], batch["values"], batch["baseline"]
            assert reference is not None and labels is not None and baseline is not None
            own, counts = policy.sums[:, 0::2], policy.counts[:, 0::2]
            good = labels[:, : own.shape[1]] > 0
            losses = unpaired_losses(
                own,
                reference[:, 0::2],
                good,
                baseline,
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            real = counts > 0
            sums = {"answers": losses.where(real, 0.0).sum()}
            figures = unpaired_figures(own, reference[:, 0::2], good, counts, self.beta)
            wanted = {name: figures[name] for name in self.figures}
            return counted_once(sums, self.columns), counted_once(wanted, self.columns)

        result: tuple[Sums, Sums] = score_answers(model, batch, self.columns, of_scores)
        return result
