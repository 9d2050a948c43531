"""What follows a decoder's last hidden states: logits over the vocabulary, or a score.

A model's forward hands it to a head function, so that a loss is taken where a sharded head is whole
and full logits need never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainwright.comm.collectives import gather, size_of, sum_forward


@dataclass(frozen=True)
class OutputHead:
    """How hidden states become logits: scale · (hidden · weightᵀ + bias), bent by `softcap`.

    weight [vocabulary, hidden], bias [vocabulary] or None; softcap c makes z into c · tanh(z / c).
    With a `group` the vocabulary is cut over its workers in rank order, and `weight` is a part.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    group: dist.ProcessGroup | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] to logits [..., vocabulary] in fp32, whole on every worker."""
        logits = gather(F.linear(hidden, self.weight, self.bias).float(), -1, self.group)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] to scores [...], by a reward model's weight [1, hidden].

        In fp32 whatever products run in: all that is learnt from is how two scores differ. With a
        `group` every worker has the whole weight, and counts for an equal share of the score, so
        that gradients are whole when they have been summed over the workers.
        """
        shares = (hidden.float() * self.weight.float()).sum(-1)
        return sum_forward(shares / size_of(self.group), self.group)


HeadFunction = Callable[[Tensor, OutputHead], Any]
