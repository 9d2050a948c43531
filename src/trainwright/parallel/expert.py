"""Expert parallelism: the experts of a layer lie on several workers, and tokens travel to them.

Nothing is dropped or padded (as MegaBlocks, arXiv:2211.15841): workers first tell each other how
many rows come, then send exactly those, multiply, and send the results back. An expert's gradient
arises where the expert is, from the rows of all workers, so that nothing is to be scaled.

The workers of `ep` hold different rows of the batch: ep is the inner part of dp_shard.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.comm.collectives import exchange, exchange_plain
from trainwright.kernels.grouped import (
    count_groups,
    group_rows,
    inverse_permutation,
    permute_rows,
    ungroup_rows,
)
from trainwright.models.decoder import Decoder
from trainwright.models.moe import Experts, SparseMLP
from trainwright.models.pieces import whole_piece
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.tensor import cut_parameter


def cut_experts(model: Decoder, mesh: Mesh) -> None:
    """Leave each worker along ep its share of every layer's experts; `model` is on meta."""
    group = mesh.group("ep")
    assert group is not None
    for prefix, module in model.named_modules():
        if not isinstance(module, SparseMLP):
            continue
        for name, parameter in module.experts.named_parameters():
            full_name = f"{prefix}.experts.{name}"
            model.pieces[full_name] = whole_piece(tuple(parameter.shape), expert=True)
            cut_parameter(model, full_name, 0, "ep", mesh.index("ep"), mesh.size("ep"))
        module.dispatch = ExpertParallel(group)


class ExpertParallel:
    """`models.moe.run_here` for experts that lie on the workers of `group`, in rank order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.workers = group, dist.get_world_size(group)

    @torch.compiler.disable  # how many rows travel is known when they do
    def __call__(self, experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], chosen and weights [tokens, per_token], of this worker's tokens."""
        own = experts.total // self.workers
        order = chosen.flatten().argsort(stable=True)
        going = count_groups(chosen, experts.total)
        equal = [own] * self.workers
        # For each origin, the rows for each of this worker's experts.
        coming = exchange_plain(going, equal, equal, self.group).view(self.workers, own)
        totals = torch.stack([going.view(self.workers, own).sum(1), coming.sum(1)])
        send, receive = totals.tolist()

        rows = exchange(group_rows(x, order, chosen.shape[1]), send, receive, self.group)
        by_expert = self._by_expert(coming)
        made = experts(permute_rows(rows, by_expert), coming.sum(0))
        made = permute_rows(made, inverse_permutation(by_expert))
        return ungroup_rows(exchange(made, receive, send, self.group), order, weights)

    def _by_expert(self, coming: Tensor) -> Tensor:
        """The order of experts for rows that lie in the order of their origins."""
        own = torch.arange(coming.shape[1], device=coming.device).repeat(self.workers)
        return own.repeat_interleave(coming.flatten()).argsort(stable=True)
