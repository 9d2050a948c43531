"""The global gradient norm, and clipping by it, for plain and for sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """2-norm over all gradients as a plain scalar, equal on every rank of a sharded model."""
    parameters = list(parameters)
    plain = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    norms = []
    if plain:
        norms.append(torch.nn.utils.get_total_norm(plain))
    if sharded:
        total = torch.nn.utils.get_total_norm(sharded)
        norms.append(total.full_tensor() if isinstance(total, DTensor) else total)
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by `factor`, a scalar on the gradients' device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if local:
        torch._foreach_mul_(local, factor)


def clip_factor(norm: Tensor, limit: float | None) -> Tensor:
    """What gradients of this norm are multiplied by to stay within `limit`; 1 without a limit."""
    if limit is None:
        return torch.ones_like(norm)
    return torch.clamp(limit / (norm + 1e-6), max=1.0)
