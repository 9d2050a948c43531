"""Recompute: forget a block's activations after its forward pass, compute them again later."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# These make operations that are named below.
import trainwright.kernels.grouped
import trainwright.parallel.ring  # noqa: F401
from trainwright.kernels.recomputing import recomputing
from trainwright.models.moe import SparseMLP
from trainwright.parallel.activation_offload import Kept, keep

Contexts = tuple[AbstractContextManager, AbstractContextManager]

# What `selective` keeps: results that cost far more to compute than to hold.
_EXPENSIVE = frozenset(
    overload
    for packet in (
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten._scaled_mm,
        torch.ops.aten._grouped_mm,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.trainwright.blocked_attention,
        torch.ops.trainwright.slotted_attention,
        torch.ops.trainwright.ring_attention,
        torch.ops.trainwright.grouped_linear,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)


def recompute_block(block: nn.Module, policy: str | float) -> None:
    """Make `block` recompute in its backward pass, as the plan's `recompute` says.

    `full` keeps nothing but the block's inputs; `selective` keeps what matrix products and
    attention return; a budget from 0 to 1 lets the partitioner of torch.compile choose what to
    keep, so that it is at most that share of what `none` keeps, for the least computing: it needs
    a block that is compiled afterwards. `none` does nothing.

    The forward is replaced on the instance rather than wrapped in a module, so that parameter
    names stay what they are. What runs a second time sees `kernels.recomputing.is_recomputing`.
    """
    if policy == "none":
        return
    forward = block.forward
    if not isinstance(policy, str):
        # As text: the compiler would take a number that differs from block to block for a variable.
        block.forward = partial(_within_budget, str(policy), forward)
    else:
        block.forward = partial(_recomputed, forward, policy == "selective")
        if policy == "selective" and any(isinstance(m, SparseMLP) for m in block.modules()):
            # Routers break the compiler's graph; a checkpoint that it cannot trace runs with the
            # contexts meant for it, which trip over the hooks of experts that are shards.
            block.forward = torch.compiler.disable(block.forward)


def _recomputed(forward: Any, selective: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        options["context_fn"] = _kept_contexts if selective else _full_contexts
    elif selective:  # the compiler knows torch's own contexts, and recomputes by itself
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    # Nothing in a block draws from a generator, so none needs to be put back.
    options |= {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(forward, *args, **options, **kwargs)


def _within_budget(policy: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
    budget = float(policy)
    region = getattr(torch.autograd.graph, "region_activation_memory_budget", None)
    if region is None:  # a torch without budgets for single blocks: the process has one
        torch._functorch.config.activation_memory_budget = budget  # type: ignore[assignment]
        region = nullcontext
    with region(budget):
        return forward(*args, **kwargs)


def _keep_expensive(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _full_contexts() -> Contexts:
    return nullcontext(), recomputing()


def _kept_contexts() -> Contexts:
    results: list[Any] = []
    return _Keep(results), _Repeat(results)


class _Keep(TorchDispatchMode):
    """Keeps the results of the expensive operations, where activations are kept.

    torch's own selective contexts give every result back once only. Ours can be read again, as a
    backward pass that is split in two must, and go to the host where activations do.
    """

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation in _EXPENSIVE:
            self.results.append(tree_map_only(Tensor, lambda x: keep(x.detach()), result))
        return result


class _Repeat(TorchDispatchMode):
    """Gives what `_Keep` kept, in the same order, and computes the rest again."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results
        self.recomputing = recomputing()

    def __enter__(self) -> Any:
        self.place = iter(self.results)
        self.recomputing.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.recomputing.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation in _EXPENSIVE:
            kept = next(self.place)
            return tree_map_only(Kept, lambda x: x.tensor().detach(), kept)
        return operation(*args, **(kwargs or {}))
