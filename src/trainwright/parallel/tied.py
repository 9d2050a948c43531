"""Tied embeddings under pipelining: the first and the last stage each hold a copy.

Each copy's gradient is that of its own use of the matrix. Their sum is the whole gradient, and
since both then hold the same bits, and the optimizer is a function of them, they stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.comm.local import local
from trainwright.models.decoder import Decoder
from trainwright.parallel.mesh import Mesh
from trainwright.planner.schedules import placement

NAME = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TiedEmbedding:
    """The copies that this worker holds, and the two workers that share where it holds one."""

    copies: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None

    @classmethod
    def between(cls, parts: Sequence[nn.Module], mesh: Mesh) -> TiedEmbedding | None:
        """Of the stages `parts`; None where there is no copy, or the model is not tied. Collective.

        Copies on one rank, where stages go down the ranks and up again, need no group.
        """
        decoders = [part for part in parts if isinstance(part, Decoder)]
        if not any(part.config.tied_embeddings for part in decoders):
            return None
        plan = mesh.plan
        first, *_, last = placement(plan.schedule, plan.pp, plan.virtual_stages)
        group = mesh.pair("tied", first, last) if first != last else None
        copies = [p for part in decoders for name, p in part.named_parameters() if name == NAME]
        return cls(tuple(copies), group) if copies else None

    def sum_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients."""
        if self.copies and self.copies[0].requires_grad:
            sum_tied_gradients(self.copies, self.group)


@torch.no_grad()
def sum_tied_gradients(copies: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of copies of one parameter, those here and those of `group`'s workers.

    A copy without a gradient adds nothing, and gets the sum as well. Of sharded gradients the
    shards are summed: both workers of a group have the same part of the matrix.
    """
    own = [_gradient(copy) for copy in copies]
    total = own[0]
    for other in own[1:]:
        total = total + other
    if group is not None:
        total = total.contiguous()
        dist.all_reduce(total, group=group)
    for gradient in own:
        gradient.copy_(total)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient as this worker holds it; zeros, now the parameter's own, where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad)
