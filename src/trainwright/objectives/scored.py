"""The objective of a reward model: of two answers the better one gets the higher score.

An answer's score is the head's at the last token of its sequence, prompt and all, as TRL and
transformers' sequence classifiers have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.comm.collectives import sum_forward
from trainwright.data.batches import Batch
from trainwright.objectives.objective import Sums, Tensors, call
from trainwright.objectives.reward import reward_figures, reward_losses
from trainwright.objectives.sequences import Columns, counted_once

FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


@dataclass(frozen=True)
class Scored:
    """`reward_losses`, the mean over the global batch's pairs; each pair's value is its margin."""

    center: float = 0.0
    columns: Columns = None
    needs_reference: bool = False
    terms: tuple[str, ...] = ("pairs", "targets")
    figures: tuple[str, ...] = FIGURES

    def weights(self, batch: Batch) -> dict[str, int]:
        """Pairs, and the tokens that their answers have."""
        return {"pairs": batch.examples, "targets": batch.weight}

    def __call__(self, model: nn.Module, batch: Tensors) -> tuple[Sums, Sums]:
        """The pairs' loss sum, and their scores."""

        def of_scores(scores: Tensor) -> tuple[Sums, Sums]:
            segments, margins = batch["segment_ids"], batch["values"]
            assert segments is not None and margins is not None
            chosen, rejected = scores[:, 0::2], scores[:, 1::2]
            numbers = torch.arange(1, scores.shape[1], 2, device=scores.device)
            real = numbers <= segments.amax(1, keepdim=True)
            losses = reward_losses(
                chosen, rejected, margins[:, : chosen.shape[1]], center=self.center
            )
            sums = {"pairs": losses.where(real, 0.0).sum()}
            figures = reward_figures(chosen, rejected, real)
            wanted = {name: figures[name] for name in self.figures}
            return counted_once(sums, self.columns), counted_once(wanted, self.columns)

        result: tuple[Sums, Sums] = score_sequences(model, batch, self.columns, of_scores)
        return result


def score_sequences(
    model: nn.Module,
    batch: Tensors,
    columns: Columns,
    use: Callable[[Tensor], Any] = lambda scores: scores,
) -> Any:
    """What `use` makes of each sequence's score [rows, segments], within the model's forward.

    0 where a row has fewer segments. The batch is as for `sequences.score_answers`, with "ends"
    [rows, own columns], true at the last token of each sequence.
    """
    own_segments, ends, number = batch["own_segments"], batch["ends"], batch["segments"]
    assert own_segments is not None and ends is not None and number is not None

    def scored(hidden: Tensor, head: Any) -> Any:
        numbers = torch.arange(int(number), device=hidden.device)
        is_end = (own_segments.unsqueeze(1) == numbers[:, None]) & ends.unsqueeze(1)
        # Which sequences end on this worker, and where; a shape that does not hang on the values.
        here, place = is_end.int().max(-1)
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        own = head.scores(hidden[rows, place]).where(here.bool(), 0.0)
        return use(sum_forward(own, columns))

    return call(model, batch, scored)
