"""Data parallelism: replicas (DDP), shards (FSDP2), and replicas of shards (HSDP).

Gradients are summed over workers, never averaged: the trainer has already divided each loss by
the weight of the whole global batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy
) -> None:
    """Shard `model` in place over `mesh`: 1-D is FSDP2, 2-D [replicate, shard] is HSDP.

    Each block is gathered when its turn comes; what lies outside the blocks (embeddings, last
    norm, head) is one group, so that tied weights stay tied.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Plain sums: gloo has no reduction that also multiplies.
            module.set_force_sum_reduction_for_comms(True)


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """`model` as one of several replicas whose gradients are summed, overlapped with backward."""
    replica = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    replica.register_comm_hook(None, _sum_gradients)
    return replica


def _sum_gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    future = dist.all_reduce(buffer, async_op=True).get_future()
    return future.then(lambda _: buffer)


# DDP looks at a hook's annotations and takes types only, not the strings they are in this file.
_sum_gradients.__annotations__ = {
    "bucket": dist.GradBucket,
    "return": torch.futures.Future[torch.Tensor],
}


def synchronise_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass ends in a reduction: only a step's last micro-batch does."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = wanted
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
        module.set_is_last_backward(wanted)
