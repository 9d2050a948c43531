"""Whole answers under a model: the log-probability of every sequence of packed rows.

What preference objectives know of a model is what stands here; it is taken inside the model's
forward, where a sharded head is whole, without ever holding full logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from trainwright.comm.collectives import sum_forward
from trainwright.kernels.linear_log_probs import linear_log_probs
from trainwright.objectives.log_probs import SequenceScores, sequence_scores
from trainwright.objectives.objective import Sums, Tensors, call

Columns = dist.ProcessGroup | None  # workers over which rows' tokens are cut


def score_answers(
    model: nn.Module,
    batch: Tensors,
    columns: Columns,
    use: Callable[[SequenceScores], Any] = lambda scores: scores,
) -> Any:
    """What `use` makes of each sequence's scores [rows, segments], within the model's forward.

    The batch holds what `next_token_loss` takes, "own_segments" [rows, own columns] or None, and
    "segments", the number of sequences in the fullest row, as a scalar on the host.
    """
    labels = batch["labels"]
    number = batch["segments"]
    assert labels is not None and number is not None

    def scored(hidden: Tensor, head: Any) -> Any:
        log_probs = linear_log_probs(
            hidden.flatten(0, 1),
            head.weight,
            labels.flatten(),
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            group=head.group,
        )
        own = sequence_scores(log_probs.view_as(labels), labels, batch["own_segments"], int(number))
        return use(SequenceScores(*(sum_forward(each, columns) for each in own)))

    return call(model, batch, scored)


def counted_once(sums: Sums, columns: Columns) -> Sums:
    """The sums on one of the workers that share rows; on the others 0, with the same gradients.

    All have whole sequences' scores, and each has the gradients of its own tokens.
    """
    if columns is None or dist.get_rank(columns) == 0:
        return sums
    return {name: each - each.detach() for name, each in sums.items()}
