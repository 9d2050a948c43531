"""Sums over the values of vectors whose every bit is the same on every machine.

`torch.sum` adds in an order that depends on the processor and its threads. Here values are added
in fp64 by halves, elementwise, in an order that is written down: what follows from a norm or a
correlation may then touch the agreed weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

WIDTH = 128
_CHUNK = 512 * WIDTH  # values at a time: they stay in the processor's cache


def fold(function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    """fp64 [WIDTH]: sums of every WIDTH-th value of `function`, which is elementwise and is given
    stretches of the vectors (all of one length) in fp64.
    """
    sums = torch.zeros(WIDTH, dtype=torch.float64)
    for start in range(0, len(vectors[0]), _CHUNK):
        values = function(*(each[start : start + _CHUNK].double() for each in vectors))
        rows = 1 << (-(-len(values) // WIDTH) - 1).bit_length()
        if len(values) < rows * WIDTH:
            values = torch.cat([values, values.new_zeros(rows * WIDTH - len(values))])
        sums += _halved(values.view(rows, WIDTH))
    return sums


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two vectors."""
    return total(fold(lambda x, y: x * y, a, b))


def norm(values: Tensor) -> float:
    """The Euclidean length of a vector."""
    return math.sqrt(total(fold(lambda x: x * x, values)))


def total(sums: Tensor) -> float:
    """The sum of what `fold` gave."""
    return float(_halved(sums.view(WIDTH, 1)))


def _halved(values: Tensor) -> Tensor:
    """The sum over the first dimension, a power of two."""
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]
