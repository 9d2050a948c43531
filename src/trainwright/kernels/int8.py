"""Weights in 8 bits: each row divided by its largest magnitude, in 127 steps either way.

The rows and scales are those of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339), but only the
weight is quantised. Activations keep their type, so there are no outliers to set apart, and
products are as exact as the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.kernels.frozen_linear import frozen_linear

_STEPS = 127
_SMALLEST = 1e-36  # a row's scale where it is divided by: 127 times its inverse is finite
_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


@dataclass(frozen=True)
class Int8:
    """A matrix in 8 bits: values int8 [out, in], each standing for value / 127 · its row's scale.

    scales fp32 [out] are the rows' largest magnitudes.
    """

    values: Tensor
    scales: Tensor


def quantise(weight: Tensor) -> Int8:
    """A matrix [out, in] in fp32, bf16 or fp16 to 8 bits; halves are rounded to the even number.

    A row of zeros has the scale 0. Raises ValueError for values that are not finite.
    """
    weight = weight.detach()
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.abs().amax(1).float()
    if not bool(scales.isfinite().all()):
        raise ValueError("holds values that are not finite")
    factors = _STEPS / scales.clamp(min=_SMALLEST)
    for row in range(0, len(weight), 256):  # so that no fp32 copy of all of it is made
        rows = slice(row, row + 256)
        values[rows] = (weight[rows] * factors[rows].unsqueeze(1)).round_().to(torch.int8)
    return Int8(values, scales)


def dequantise(weight: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in] that `weight` stands for, computed in fp32."""
    return (weight.values * weight.scales.unsqueeze(1) * _STEP).to(dtype)


def linear(x: Tensor, weight: Int8, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, by `frozen_linear`."""
    return frozen_linear(x, bias, _factors, weight.values, weight.scales)


def _factors(dtype: torch.dtype, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Whole numbers, which are exact in bf16 and fp32, and the rows' scales for their product."""
    if dtype == torch.float16:  # too narrow a range for sums of up to 127 times an activation
        return dequantise(Int8(values, scales), dtype), None
    return values.to(dtype), (scales * _STEP).to(dtype)
