"""Clipping by the global norm of the gradients, which `parallel.gradients` takes over all axes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainwright.comm.local import local


@torch.no_grad()
def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by `factor`, a scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        own = local(gradient)
        by_device.setdefault(own.device, []).append(own)
    for device, there in by_device.items():
        # Gradients of offloaded shards are on the host, their norm on the device.
        torch._foreach_mul_(there, factor.to(device))


def clip_factor(norm: Tensor, limit: float | None) -> Tensor:
    """What gradients of this norm are multiplied by to stay within `limit`; 1 without a limit."""
    if limit is None:
        return torch.ones_like(norm)
    return torch.clamp(limit / (norm + 1e-6), max=1.0)
