"""Matrices as sums of cosines, chunk by chunk: what DeMo and DisTrO choose the largest parts of.

DeMo (Peng, Quesnelle, Kingma 2024, arXiv:2411.19870) cuts each matrix into chunks of at most 64 by
64 values and takes their discrete cosine transform (DCT-II, orthonormal, along both sides). Peers
must agree bit for bit on what a set of coefficients means, and even a sign may hang on the order in
which products are summed. So all sums are exact: factors are rounded to integers of 25 bits, of
which an fp64 holds any sum of products that occurs here, and only whole sums are rounded, as IEEE
754 defines it. That is about as precise as fp32, and the same by any machine's matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainwright.comm.codecs.codec import Codec, Plane, Planes
from trainwright.comm.codecs.index_coding import Cut, Rice
from trainwright.comm.codecs.planes import Floats, check_finite, finite_vector
from trainwright.comm.codecs.top_k import TopK, cut

LARGEST_SIDE = 64
BITS = 25  # of a factor: 64 products of 25 by 25 bits, with an orthonormal table, are below 2^53
_AT_ONCE = 256  # chunks: what is under way stays in a CPU's caches

Blocks = NDArray[np.float64]  # [chunks, height, width]


@dataclass(frozen=True)
class _Matrices:
    """A tensor as matrices that are cut into chunks: where it starts, how many, and their size."""

    start: int
    count: int
    height: int
    width: int

    @property
    def size(self) -> int:
        return self.count * self.height * self.width


class ChunkedDCT:
    """The transform of all tensors in a vector, and its inverse.

    `shapes` are those of the tensors, in the order of the vector. A chunk's side is the largest
    divisor of the tensor's that is at most 64; vectors have chunks of one row, and tensors of more
    than two dimensions are stacks of matrices. Coefficients are ordered by size of chunk, then by
    tensor, then by chunk: equal chunks are transformed together.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._tensors: dict[tuple[int, int], list[_Matrices]] = {}
        start = 0
        for shape in shapes:
            *stack, height, width = (1, 1, *shape)
            matrices = _Matrices(start, math.prod(stack), height, width)
            start += matrices.size
            if matrices.size:
                chunk = (side_of(height), side_of(width))
                self._tensors.setdefault(chunk, []).append(matrices)
        self.count = start

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """How many chunks of how many values lie one after the other in the coefficients."""
        return [
            (sum(each.size for each in tensors) // (height * width), height * width)
            for (height, width), tensors in self._tensors.items()
        ]

    def forward(self, values: Tensor) -> Tensor:
        """Coefficients fp32 [count] of a vector fp32 [count]."""
        flat, found, start = finite_vector(values), np.empty(self.count, np.float32), 0
        for (height, width), tensors in self._tensors.items():
            for each in tensors:
                chunks = _chunks(flat, each, height, width).reshape(-1, height, width)
                stop = start + each.size
                found[start:stop] = _transform(chunks, inverse=False).reshape(-1)
                start = stop
        return torch.from_numpy(found)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """The vector fp32 [count] of such coefficients, the same bits on every machine.

        Values beyond fp32's range become infinite.
        """
        flat, found, start = finite_vector(coefficients), np.empty(self.count, np.float32), 0
        for (height, width), tensors in self._tensors.items():
            for each in tensors:
                stop = start + each.size
                values = _transform(flat[start:stop].reshape(-1, height, width), inverse=True)
                place = _chunks(found, each, height, width)
                place[...] = values.reshape(place.shape)
                start = stop
        return torch.from_numpy(found)


class DctTopK(TopK):
    """Vectors by the largest coefficients of every chunk: what DeMo and DisTrO send.

    `density` is the share of coefficients kept (DeMo's release: 32 of 4096), `values` writes them:
    bf16 in DeMo, 1 bit in DisTrO. Planes: those of `TopK` over coefficients.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], *, density: float, values: Codec) -> None:
        super().__init__("dct-top-k", density, Rice(), values)
        self.transform = ChunkedDCT(shapes)
        self.count = self.transform.count

    def cuts(self, count: int) -> list[Cut]:
        """The transform's chunks."""
        return [cut(rows, length, self.density) for rows, length in self.transform.chunks]

    def encode(self, values: Tensor) -> Planes:
        """See `Codec.encode`; of a vector of values."""
        return super().encode(self.transform.forward(values))

    def coefficients(self, planes: Sequence[Plane]) -> Tensor:
        """The coefficients that were sent, fp32 [count], zero elsewhere. Raises BrokenPlanes."""
        return super().decode(planes, self.count)

    def decode(self, planes: Sequence[Plane], count: int) -> Tensor:
        """See `Codec.decode`; the values that those coefficients make."""
        found = self.transform.inverse(self.coefficients(planes))
        check_finite(found.numpy(), "values")
        return found


def side_of(size: int) -> int:
    """The largest divisor of `size` that is at most 64."""
    return next(side for side in range(min(size, LARGEST_SIDE), 0, -1) if size % side == 0)


@cache
def table(side: int) -> Blocks:
    """The DCT-II's matrix [frequency, place] in integers of 2^25: √(2/n)·cos(π(2p+1)f / 2n), the
    first row by √½.
    """
    frequency, place = np.arange(side)[:, None], np.arange(side)[None, :]
    # Reduced to whole turns before the cosine is taken, which keeps its last bit right.
    angle = np.pi * ((2 * place + 1) * frequency % (4 * side)) / (2 * side)
    found = np.cos(angle) * np.sqrt(2 / side)
    found[0] = np.sqrt(1 / side)
    return np.rint(np.ldexp(found, BITS))


def _chunks(flat: Floats, tensor: _Matrices, height: int, width: int) -> Floats:
    """A view [matrices, rows of chunks, chunks in a row, height, width] of a tensor's values."""
    tall, wide = tensor.height // height, tensor.width // width
    own = flat[tensor.start : tensor.start + tensor.size]
    return own.reshape(tensor.count, tall, height, wide, width).transpose(0, 1, 3, 2, 4)


def _transform(chunks: Floats, inverse: bool) -> Floats:
    """fp32 [chunks, height, width] transformed along both sides, by exact sums."""
    _, height, width = chunks.shape
    left, right = table(height), table(width).T
    if inverse:
        left, right = left.T, right.T
    found = np.empty(chunks.shape, np.float32)
    for start in range(0, len(chunks), _AT_ONCE):
        part = chunks[start : start + _AT_ONCE].astype(np.float64)
        if width > 1:
            whole, exponent = _integers(part)
            part = np.ldexp(whole @ right, exponent - BITS)
        if height > 1:
            whole, exponent = _integers(part)
            part = np.ldexp(left @ whole, exponent - BITS)
        with np.errstate(over="ignore"):
            found[start : start + _AT_ONCE] = part
    return found


def _integers(chunks: Blocks) -> tuple[Blocks, NDArray[np.int32]]:
    """Each chunk as integers of at most 25 bits and the power of two that they count."""
    _, exponent = np.frexp(np.abs(chunks).max(axis=(1, 2), keepdims=True))
    exponent = exponent - BITS
    return np.rint(np.ldexp(chunks, -exponent)), exponent
