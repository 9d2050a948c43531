"""RMS normalisation (Zhang and Sennrich 2019), computed in fp32 whatever the stream's type.

Its own backward pass keeps the input and one number a row, where autograd would keep several fp32
copies of the stream: half the time and a fraction of the memory where nothing is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + offset) over the last dimension.

    x [..., channels], weight [channels]; returns x's shape and dtype. `offset` is 1 for families
    that store their norms' weights around zero.
    """
    return _RMSNorm.apply(x, weight, eps, offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm` as its formula reads; its plain reference."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + offset)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return (wide * inverse).mul_(weight.float() + offset).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        normed, gradient = x.float() * inverse, gradient.float()
        for_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not wants_x:
            return None, for_weight, None, None
        # d/dx of x · inverse: what points along x is taken out, for scaling x changes nothing.
        gradient = gradient * (weight.float() + ctx.offset)
        along = (gradient * normed).mean(-1, keepdim=True)
        for_x = (gradient - normed * along).mul_(inverse).to(x.dtype)
        return for_x, for_weight if wants_weight else None, None, None
