"""Blocks of 128 values in 4 bits, a sign and a power of two, with one scale: 0.5156 bytes a value.

Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) sends its fragments in this format: three
bits of exponent and none of mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainwright.comm.codecs.bits import pack, packed_bytes, unpack
from trainwright.comm.codecs.codec import BrokenPlanes, Plane, Planes
from trainwright.comm.codecs.dense import read_bf16, write_bf16
from trainwright.comm.codecs.int8 import check_scales
from trainwright.comm.codecs.planes import block_count, blocks, finite_vector, sized

BLOCK = 128
NEGATIVE = 8  # the sign's bit
LEVELS = np.array([0, *(2.0**power for power in range(-6, 1))], np.float32)  # of codes 0 … 7


class E3M0:
    """value ≈ ± scale · level with level in 0, 2⁻⁶, 2⁻⁵, … 1: the nearest of the block's largest.

    The scale is then the one of least squared error for the levels chosen: rounding to powers of
    two alone would make values 6 % too short. Planes: scales (bf16), codes (4 bits).
    """

    name = "e3m0"

    def encode(self, values: Tensor) -> Planes:
        """See `Codec.encode`."""
        rows = blocks(finite_vector(values), BLOCK)
        sizes = np.abs(rows)
        peak = sizes.max(axis=1, initial=0, keepdims=True)
        share = sizes / np.where(peak > 0, peak, 1)  # 0 … 1
        # The midpoint above 2^n is 1.5 · 2^n: exponents of share / 0.75 count levels.
        codes = (np.frexp(share / np.float32(0.75))[1] + 6).clip(1, 7).astype(np.uint8)
        codes[share < LEVELS[1] / 2] = 0
        chosen = LEVELS[codes]
        fit = (chosen * sizes.astype(np.float64)).sum(axis=1)
        scales = fit / np.maximum((chosen * chosen).sum(axis=1), 1)  # the peak's level is 1
        codes[(rows < 0) & (codes > 0)] += NEGATIVE
        flat = codes.reshape(-1)[: values.numel()]
        return [write_bf16(scales.astype(np.float32)), pack(flat, 4)]

    def decode(self, planes: Sequence[Plane], count: int) -> Tensor:
        """See `Codec.decode`."""
        of_scales, plane = sized(
            planes, scales=2 * block_count(count, BLOCK), codes=packed_bytes(count, 4)
        )
        scales = read_bf16(of_scales)
        check_scales(scales, float(np.finfo(np.float32).max))
        codes = unpack(plane, 4, count)
        if (codes == NEGATIVE).any():
            raise BrokenPlanes("a negative zero, which is never written")
        signed = np.concatenate([LEVELS, -LEVELS])
        found = signed[blocks(codes, BLOCK)] * scales[:, None]
        return torch.from_numpy(found.reshape(-1)[:count])

    def most_bytes(self, count: int) -> int:
        """See `Codec.most_bytes`."""
        return packed_bytes(count, 4) + 2 * block_count(count, BLOCK)
