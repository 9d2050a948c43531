"""Products with a frozen, packed weight, which is unpacked for each of them and then let go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (type of the product, packed tensors …) to a matrix [out, in] of that type and what its rows are
# still to be multiplied by [out], if anything.
Unpack = Callable[..., tuple[Tensor, Tensor | None]]


def frozen_linear(x: Tensor, bias: Tensor | None, unpack: Unpack, *packed: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, the weight being what `unpack` makes of the packed tensors.

    x [..., in] to [..., out]; bias [out] or None. It runs in autocast's type where that is on, or
    else in x's. x and bias get gradients. Only the packed tensors are kept for the backward pass.
    """
    kind, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    bias = None if bias is None else bias.to(dtype)
    return _FrozenLinear.apply(x.to(dtype), bias, unpack, *packed)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, unpack: Unpack, *packed: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*packed)
        ctx.unpack = unpack
        matrix, scale = unpack(x.dtype, *packed)
        with torch.autocast(x.device.type, enabled=False):
            if scale is None:
                return F.linear(x, matrix, bias)
            product = F.linear(x, matrix) * scale
            return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        packed = ctx.saved_tensors  # once: recomputation gives each of them a single time
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            matrix, scale = ctx.unpack(gradient.dtype, *packed)
            with torch.autocast(gradient.device.type, enabled=False):
                for_x = (gradient if scale is None else gradient * scale) @ matrix
        if ctx.needs_input_grad[1]:
            for_bias = gradient.flatten(0, -2).sum(0)
        return for_x, for_bias, None, *(None for _ in packed)
