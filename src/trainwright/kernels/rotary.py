"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the half-split layout.

Channel i of a head turns together with channel i + dim/2, as in Hugging Face's checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_tables(
    positions: Tensor, frequencies: Tensor, *, scale: float = 1.0, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, times `scale`, computed in fp32.

    positions [batch or 1, sequence] in tokens; frequencies [dim/2], or [batch, sequence, dim/2]
    where they differ from token to token, in radians a token. Returns two tensors
    [batch or 1, sequence, dim/2] of `dtype`; made once for all the layers of a forward pass.
    """
    angles = positions[..., None].float() * frequencies
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 × (dim/2) channels of every head; the others pass through.

    x [batch, sequence, heads, head_dim]; cos, sin [batch or 1, sequence, dim/2], which take no
    gradient.
    """
    return _Rotate.apply(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as a product of complex numbers, in fp32; its plain reference."""
    half = cos.shape[-1]
    wide = x.float()
    pairs = torch.complex(wide[..., :half], wide[..., half : 2 * half])
    turned = pairs * torch.complex(cos.float(), sin.float()).unsqueeze(2)
    return torch.cat([turned.real, turned.imag, wide[..., 2 * half :]], dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back; nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    # Two passes over x and no joining of halves, which would copy everything once more.
    still = cos.new_ones(*cos.shape[:-1], rest)
    result = x * torch.cat([cos, cos, still], dim=-1).unsqueeze(2)
    sin = sin.unsqueeze(2)
    result[..., :half].addcmul_(x[..., half : 2 * half], sin, value=-sign)
    result[..., half : 2 * half].addcmul_(x[..., :half], sin, value=sign)
    return result
