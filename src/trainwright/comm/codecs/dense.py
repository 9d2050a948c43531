"""Every value by itself, in fp32 or bf16: 4 or 2 bytes a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainwright.comm.codecs.codec import Plane, Planes
from trainwright.comm.codecs.planes import Floats, check_finite, finite_vector, sized

LARGEST_BF16 = torch.finfo(torch.bfloat16).max


class Dense:
    """fp32 as it is, or bf16, rounded to nearest (ties to even; beyond the largest to the largest).

    One plane, little-endian.
    """

    def __init__(self, kind: Literal["fp32", "bf16"]) -> None:
        self.name: str = kind
        self.width = 4 if kind == "fp32" else 2

    def encode(self, values: Tensor) -> Planes:
        """See `Codec.encode`."""
        found = finite_vector(values)
        if self.name == "fp32":
            return [found.astype("<f4").view(np.uint8)]
        return [write_bf16(found)]

    def decode(self, planes: Sequence[Plane], count: int) -> Tensor:
        """See `Codec.decode`."""
        (plane,) = sized(planes, values=count * self.width)
        found = plane.view("<f4").astype(np.float32) if self.name == "fp32" else read_bf16(plane)
        check_finite(found, "values")
        return torch.from_numpy(found)

    def most_bytes(self, count: int) -> int:
        """See `Codec.most_bytes`."""
        return count * self.width


def write_bf16(values: Floats) -> Plane:
    """Finite values in bf16, two bytes each, rounded as `Dense` says."""
    near = torch.from_numpy(values).clamp(-LARGEST_BF16, LARGEST_BF16).to(torch.bfloat16)
    return near.view(torch.int16).numpy().astype("<i2").view(np.uint8)


def read_bf16(plane: Plane) -> Floats:
    """fp32 values of such bytes, as many as there are."""
    return (plane.view("<u2").astype(np.uint32) << 16).view(np.float32)
