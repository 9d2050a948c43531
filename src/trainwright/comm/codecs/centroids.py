"""Values in 1 or 2 bits: the number of a bin, whose members' mean stands for each of them.

With groups of 1024 values 0.1289 or 0.2578 bytes a value. The bins are SparseLoCo's and MuLoCo's
(arXiv:2508.15706, 2505.23725) but for their edges: ±σ about zero, where theirs are ±1.5 σ about the
mean, beyond which hardly any of a chunk's largest values lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainwright.comm.codecs.bits import pack, packed_bytes, unpack
from trainwright.comm.codecs.codec import Plane, Planes
from trainwright.comm.codecs.dense import read_bf16, write_bf16
from trainwright.comm.codecs.planes import (
    block_count,
    blocks,
    check_finite,
    finite_vector,
    sized,
)


class Centroids:
    """Bins with edges −σ, 0, σ (2 bits) or 0 (1 bit), σ the root mean square of a group of values.

    A group's table has the mean of each bin's members, 0 where it has none, in bf16. Means and not
    signs: what error feedback takes off is what was there, on average. Planes: tables, codes.
    """

    def __init__(self, bits: Literal[1, 2], group: int = 1024) -> None:
        self.name = f"{bits}bit"
        self.bits = bits
        self.bins = 1 << bits
        self.group = group

    def encode(self, values: Tensor) -> Planes:
        """See `Codec.encode`."""
        count = values.numel()
        rows = blocks(finite_vector(values), self.group)
        codes = (rows >= 0).view(np.uint8)
        if self.bits == 2:
            sigma = np.sqrt(_sums(rows * rows.astype(np.float64)) / self._members(count))
            sigma = sigma.astype(np.float32)[:, None]
            codes = codes + (rows >= -sigma) + (rows >= sigma)
        tables = np.empty((len(rows), self.bins))
        for code in range(self.bins):
            members = codes == code
            sums, counts = _sums(np.where(members, rows, 0)), members.sum(axis=1)
            if len(rows) and code == self.bins // 2:  # what filled up the last group is no member
                counts[-1] -= rows.size - count
            tables[:, code] = sums / np.maximum(counts, 1)
        plane = write_bf16(tables.astype(np.float32).reshape(-1))
        return [plane, pack(codes.reshape(-1)[:count], self.bits)]

    def decode(self, planes: Sequence[Plane], count: int) -> Tensor:
        """See `Codec.decode`."""
        groups = block_count(count, self.group)
        of_tables, plane = sized(
            planes, tables=2 * self.bins * groups, codes=packed_bytes(count, self.bits)
        )
        tables = read_bf16(of_tables)
        check_finite(tables, "tables")
        codes = blocks(unpack(plane, self.bits, count), self.group)
        first = self.bins * np.arange(groups, dtype=np.int32)[:, None]
        return torch.from_numpy(tables[codes + first].reshape(-1)[:count])

    def most_bytes(self, count: int) -> int:
        """See `Codec.most_bytes`."""
        return packed_bytes(count, self.bits) + 2 * self.bins * block_count(count, self.group)

    def _members(self, count: int) -> NDArray[np.int64]:
        """How many values each group has."""
        starts = np.arange(0, count, self.group)
        return np.minimum(count - starts, self.group)


def _sums(rows: NDArray) -> NDArray[np.float64]:
    return rows.sum(axis=1, dtype=np.float64)
