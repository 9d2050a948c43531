"""What a codec is: a vector of fp32 values as planes of bytes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Plane = NDArray[np.uint8]  # [bytes], one kind of content: scales, codes, indices
Planes = list[Plane]


class BrokenPlanes(ValueError):  # noqa: N818
    """Planes that no vector of that length can have been written as; the message says why."""


class Codec(Protocol):
    """Writes vectors of a length that both sides know, and reads them.

    `decode` is given planes from strangers: it raises BrokenPlanes for whatever `encode` cannot
    have written (sizes, indices out of range or twice, scales that are not finite), and never
    allocates more than a few vectors of `count`. Both are pure: equal bytes and values on every
    machine, so that peers agree bit for bit.
    """

    name: str

    def encode(self, values: Tensor) -> Planes:
        """`values` is fp32 [count] on the CPU, all finite. Raises ValueError otherwise."""
        ...

    def decode(self, planes: Sequence[Plane], count: int) -> Tensor:
        """fp32 [count] on the CPU, zero where nothing was sent. Raises BrokenPlanes."""
        ...

    def most_bytes(self, count: int) -> int:
        """The most bytes that all planes of a vector of `count` values together can have."""
        ...
