"""From a model on meta to a model spread over the workers: the order, on one screen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from trainwright.models.decoder import Decoder
from trainwright.models.fallback import FallbackModel
from trainwright.parallel.precision import sharded_policy
from trainwright.parallel.recompute import recompute_block
from trainwright.parallel.shard import replicate, shard
from trainwright.parallel.world import World, build_mesh
from trainwright.planner.plan import Plan

Model = Decoder | FallbackModel


@dataclass(frozen=True)
class SpreadModel:
    """`model` has the parameters, under their own names; `forward` is what a step calls."""

    model: Model
    forward: nn.Module
    sharded: bool


def spread(
    model: Model,
    plan: Plan,
    world: World,
    fill: Callable[[Model], None],
) -> SpreadModel:
    """Recompute → compile → shard → materialise → fill → replicate.

    `model` is on meta, or already holds its weights; `fill` writes the weights of a model that
    was on meta into the memory it now has, each worker its own part.
    """
    blocks = list(model.blocks)
    if plan.recompute != "none":
        for block in blocks:
            recompute_block(block, plan.recompute)
    if plan.compile:
        for block in blocks:
            block.compile()
    sharded = plan.dp_shard > 1
    if sharded:
        mesh = build_mesh(plan, world)
        shard(
            model,
            blocks,
            mesh if plan.dp_replicate > 1 else mesh["dp_shard"],
            sharded_policy(plan.precision),
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=world.device)
        fill(model)
    else:
        model.to(world.device)
    forward: nn.Module = model
    if not sharded and plan.dp_replicate > 1:
        forward = replicate(model, world.device)
    return SpreadModel(model, forward, sharded)


def force_eager() -> AbstractContextManager:
    """Run compiled blocks plainly: generation's shapes change with every token."""
    return torch.compiler.set_stance("force_eager")
