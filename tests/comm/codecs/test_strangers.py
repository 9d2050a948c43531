"""Planes from strangers: refused, or read as finite values, in little memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from tests.comm.codecs.vectors import every_codec, vectors
from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.codec import BrokenPlanes, Codec, Planes
from trainwright.comm.codecs.dct import DctTopK
from trainwright.comm.codecs.dense import Dense
from trainwright.recipe.swarm import CodecName

COUNT = 9000  # = 90 · 100
CODECS = [*every_codec(), DctTopK([(90, 100)], density=0.01, values=Dense("bf16"))]
BY_NAME = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def mutated(planes: Planes, rng: np.random.Generator) -> Planes:
    """The planes with one thing wrong, or several."""
    found = [plane.copy() for plane in planes]
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(found)))
        plane = found[at]
        match rng.integers(9):
            case 0 | 1 | 2 if plane.size:
                plane[rng.integers(plane.size)] ^= np.uint8(1 << rng.integers(8))
            case 3 if plane.size:
                start = rng.integers(plane.size)
                plane[start : start + 8] = rng.integers(256, size=len(plane[start : start + 8]))
            case 4:
                found[at] = plane[: rng.integers(plane.size + 1)]
            case 5:
                more = rng.integers(256, size=rng.integers(1, 9)).astype(np.uint8)
                found[at] = np.concatenate([plane, more])
            case 6:
                found[at] = found[int(rng.integers(len(found)))].copy()
            case 7:
                found[at] = np.full(plane.size, rng.choice([0, 127, 128, 255]), np.uint8)
            case 8:
                found[at] = rng.integers(256, size=plane.size).astype(np.uint8)
    return found


def try_mutated(codec: Codec, times: int) -> tuple[int, int]:
    """How many were read and how many refused."""
    rng = np.random.default_rng(7)
    origins = [codec.encode(values) for kind, values in vectors(COUNT) if kind != "largest"]
    read = refused = 0
    for _ in range(times):
        planes = mutated(origins[rng.integers(len(origins))], rng)
        try:
            values = codec.decode(planes, COUNT)
        except BrokenPlanes as error:
            assert str(error)
            refused += 1
        else:
            assert values.dtype == torch.float32 and values.shape == (COUNT,)
            assert torch.isfinite(values).all()
            read += 1
    return read, refused


@BY_NAME
def test_mutated_planes_are_refused_or_read_as_finite_values(codec: Codec) -> None:
    read, refused = try_mutated(codec, 250)
    assert refused > 50 and read + refused == 250


@pytest.mark.prove
@BY_NAME
def test_very_many_mutated_planes(codec: Codec) -> None:
    read, refused = try_mutated(codec, 10_000)
    assert refused > 2000 and read + refused == 10_000


@BY_NAME
def test_what_is_no_row_of_bytes_is_refused(codec: Codec) -> None:
    planes = codec.encode(torch.ones(COUNT))
    wrong: list[Any] = [
        [],
        planes[1:],
        [*planes, planes[0]],
        [planes[0].astype(np.int64), *planes[1:]],
        [*planes[:-1], planes[-1].view(np.int8)],
        [planes[0][:, None], *planes[1:]],
        [np.zeros(50 * COUNT, np.uint8)] * len(planes),
    ]
    for each in wrong:
        with pytest.raises(BrokenPlanes):
            codec.decode(each, COUNT)


@pytest.mark.parametrize(
    ("name", "plane", "values", "reason"),
    [
        ("fp32", 0, [0, 0, 0x80, 0x7F], "values that are not finite"),
        ("bf16", 0, [0xC0, 0xFF], "values that are not finite"),
        ("int8", 1, [0x80], "a code of -128"),
        ("int8", 0, [0x80, 0xBF], "scales that no block"),  # -1
        ("int8", 0, [0x80, 0x7C], "scales that no block"),  # 127 of it are beyond fp32
        ("e3m0", 0, [0xC0, 0x7F], "scales that no block"),  # NaN
        ("e3m0", 1, [0x08], "a negative zero"),
        ("2bit", 0, [0x80, 0xFF], "tables that are not finite"),
        ("1bit", 0, [0x80, 0x7F], "tables that are not finite"),
        ("top-k", 1, [0x80, 0x7F], "tables that are not finite"),
        ("top-k-12bit", 0, [0, 0, 0], "do not ascend"),
    ],
)
def test_what_is_never_written_is_refused_by_name(
    name: CodecName, plane: int, values: list[int], reason: str
) -> None:
    codec = build_codec(name, density=1 / 64)
    planes = codec.encode(torch.linspace(-1, 1, COUNT))
    codec.decode(planes, COUNT)
    planes[plane][: len(values)] = values
    with pytest.raises(BrokenPlanes, match=reason):
        codec.decode(planes, COUNT)


@BY_NAME
def test_reading_takes_no_more_memory_than_a_few_vectors(codec: Codec) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(COUNT).astype(np.float32))
    planes = codec.encode(values)
    huge = [np.zeros(100 * COUNT, np.uint8)] * len(planes)
    codec.decode(planes, COUNT)  # tables that are made once
    tracemalloc.start()
    codec.decode(planes, COUNT)
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with pytest.raises(BrokenPlanes):
        codec.decode(huge, COUNT)
    refused = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read < 12 * 4 * COUNT and refused < 4 * COUNT
