"""Recompute: forget a block's activations after its forward pass, compute them again later."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# What `selective` keeps: results that cost far more to compute than to hold.
_EXPENSIVE = frozenset(
    overload
    for packet in (
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.trainwright.blocked_attention,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)


def _keep_expensive(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def recompute_block(block: nn.Module, policy: str) -> None:
    """Make `block` recompute in its backward pass: `full`, or `selective` (keep matrix products).

    The forward is replaced on the instance rather than wrapped in a module, so that parameter
    names stay what they are.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = recomputed
