"""Blocks of 128 values in 8 bits with one scale: 1.0156 bytes a value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainwright.comm.codecs.codec import BrokenPlanes, Plane, Planes
from trainwright.comm.codecs.dense import read_bf16, write_bf16
from trainwright.comm.codecs.planes import Floats, block_count, blocks, finite_vector, sized

BLOCK = 128
LEVELS = 127
LARGEST_SCALE = 2.0**121 * 129 / 128  # the last bf16 of which 127 times is an fp32


class Int8:
    """value ≈ scale · code, with codes from −127 to 127.

    The scale is the block's largest magnitude / 127, rounded up to a bf16, so that no code is
    clipped and no error above half a scale. Planes: scales (bf16), codes (int8).
    """

    name = "int8"

    def encode(self, values: Tensor) -> Planes:
        """See `Codec.encode`."""
        rows = blocks(finite_vector(values), BLOCK)
        peak = np.abs(rows).max(axis=1, initial=0)
        scales = np.minimum(_up_to_bf16(peak / np.float32(LEVELS)), np.float32(LARGEST_SCALE))
        codes = np.rint(rows / np.where(scales > 0, scales, 1)[:, None]).clip(-LEVELS, LEVELS)
        flat = codes.astype(np.int8).reshape(-1)[: values.numel()]
        return [write_bf16(scales), flat.view(np.uint8)]

    def decode(self, planes: Sequence[Plane], count: int) -> Tensor:
        """See `Codec.decode`."""
        of_scales, plane = sized(planes, scales=2 * block_count(count, BLOCK), codes=count)
        scales = read_bf16(of_scales)
        check_scales(scales, LARGEST_SCALE)
        codes = plane.view(np.int8)
        if (codes == -128).any():
            raise BrokenPlanes("a code of -128, which is never written")
        found = blocks(codes, BLOCK) * scales[:, None]
        return torch.from_numpy(found.reshape(-1)[:count])

    def most_bytes(self, count: int) -> int:
        """See `Codec.most_bytes`."""
        return count + 2 * block_count(count, BLOCK)


def _up_to_bf16(values: Floats) -> Floats:
    """The least bf16s that are no smaller; of values from 0."""
    return (values.view(np.uint32) + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)


def check_scales(scales: Floats, largest: float) -> None:
    """Raise BrokenPlanes for scales below 0, above the largest, or no numbers."""
    if not ((scales >= 0) & (scales <= largest)).all():
        raise BrokenPlanes("scales that no block can have")
