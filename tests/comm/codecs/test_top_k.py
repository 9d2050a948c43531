"""Top-k against sorting in Python, and the bytes that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.comm.codecs.vectors import vectors
from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.dense import Dense
from trainwright.comm.codecs.index_coding import Rice, TwelveBits
from trainwright.comm.codecs.top_k import TopK


def by_sorting(values: Tensor, density: float) -> Tensor:
    found = torch.zeros_like(values)
    for at in range(0, len(values), 4096):
        chunk = values[at : at + 4096].tolist()
        order = sorted(range(len(chunk)), key=lambda place: (-abs(chunk[place]), place))
        for place in order[: max(1, round(density * len(chunk)))]:
            found[at + place] = chunk[place]
    return found


@pytest.mark.parametrize("density", [1e-4, 1 / 64, 0.3, 1.0])
def test_the_largest_of_each_chunk_are_kept_and_the_earlier_of_equals(density: float) -> None:
    codec = TopK("exact", density, Rice(), Dense("fp32"))
    for size in (0, 1, 129, 4096, 5000):
        for kind, values in vectors(size):
            decoded = codec.decode(codec.encode(values), size)
            assert torch.equal(decoded, by_sorting(values, density)), (kind, size)


def test_both_codings_of_places_say_the_same_values() -> None:
    for _, values in vectors(13000):
        rice, twelve = (
            TopK("", 1 / 64, places, Dense("bf16")) for places in (Rice(), TwelveBits())
        )
        read = [codec.decode(codec.encode(values), 13000) for codec in (rice, twelve)]
        assert torch.equal(*read)


def test_bytes_are_as_few_as_announced() -> None:
    """SparseLoCo's: 146.2 times less than fp32 with 12 bits a place, 200 times with entropy coding
    (of an even choice, the hardest); every byte of every plane is counted.
    """
    count = 1 << 20
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(count).astype(np.float32))
    for name, ratio in (("top-k-12bit", 146.2), ("top-k", 213.5)):
        codec = build_codec(name, density=1 / 64)  # type: ignore[arg-type]
        size = sum(plane.size for plane in codec.encode(values))
        assert 4 * count / size >= ratio
        assert size <= codec.most_bytes(count) <= 1.06 * size
