"""Sharded data parallelism: ZeRO's three stages and replicas of shards, by FSDP2.

Gradients are summed over workers, never averaged: the trainer has already divided each loss by
the weight of the whole global batch.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from trainwright.parallel.mesh import Mesh
from trainwright.parallel.precision import offload_policy, sharded_policy
from trainwright.planner.plan import Plan


def shard(model: nn.Module, blocks: list[nn.Module], plan: Plan, mesh: Mesh) -> None:
    """Shard `model` in place, each block a group of its own, over the mesh's `fsdp` workers.

    What lies outside the blocks (embeddings, last norm, head) is one group, so that tied weights
    stay tied. Experts that are cut over ep are sharded over the workers that hold equal ones.
    The weights gathered for a forward pass stay until its backward pass unless `plan.zero` is 3.
    """
    options: dict[str, Any] = {
        "mp_policy": sharded_policy(plan.precision),
        "offload_policy": offload_policy(plan, mesh.world.device),
        "reshard_after_forward": plan.zero == 3,
    }
    whole = mesh.device_mesh("fsdp")
    for block in blocks:
        if plan.ep > 1:
            for experts in expert_modules(block):
                fully_shard(experts, mesh=mesh.device_mesh("expert_fsdp"), **options)
        fully_shard(block, mesh=whole, **options)
    fully_shard(model, mesh=whole, **options)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # Plain sums: gloo has no reduction that also multiplies.
        module.set_force_sum_reduction_for_comms(True)


def expert_modules(block: nn.Module) -> list[nn.Module]:
    """The modules within `block` whose parameters are experts."""
    return [m for name, m in block.named_modules() if name.rpartition(".")[2] == "experts"]


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module of `model` that has a group of shards of its own."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_micro_batch(model: nn.Module, plan: Plan, *, last: bool) -> None:
    """Before a backward pass: whether it is the last of its step, and what stage of ZeRO follows.

    Stage 1 adds gradients up whole and reduces them once; 2 and 3 reduce every micro-batch's.
    Stages 1 and 2 gather weights once a step; 3 does for every pass. Replicas of shards are
    summed once.
    """
    for module in sharded_modules(model):
        module.set_requires_gradient_sync(last or plan.zero > 1, recurse=False)
        module.set_requires_all_reduce(last, recurse=False)
        module.set_reshard_after_backward(last or plan.zero == 3, recurse=False)
        module.set_is_last_backward(last)


def reduce_deferred(model: nn.Module) -> None:
    """Reduce gradients that were written after their module's backward pass had gone by.

    Deferred weight gradients (`parallel.weight_gradients`) come too late for FSDP's own hooks.
    """
    for module in sharded_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group
        if group is not None:
            group.post_backward()
    root = model._get_fsdp_state()  # type: ignore[operator]
    root._root_post_backward_final_callback()


def widen_gradients(model: nn.Module) -> None:
    """Add gradients that deferred products have just written to the sums in the wider type.

    FSDP does so after every backward pass of its own, so that narrow gradients never add up.
    """
    for module in sharded_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group is not None else ():
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


def release(model: nn.Module) -> None:
    """Give back gathered weights: the optimizer is about to change the shards."""
    for module in sharded_modules(model):
        module.reshard()
