"""Each format read value by value, as its docstring describes it, against what decode makes of it;
and what encode chose, against the best that there is.
"""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.comm.codecs.vectors import SIZES, vectors
from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.centroids import Centroids
from trainwright.comm.codecs.codec import Plane
from trainwright.comm.codecs.e3m0 import LEVELS
from trainwright.comm.codecs.int8 import LARGEST_SCALE, Int8

TRIED = [
    pytest.param(values, id=f"{kind}, {size}") for size in SIZES for kind, values in vectors(size)
]


def bf16(plane: Plane) -> list[float]:
    pairs = plane.tobytes()
    return [struct.unpack("<f", b"\0\0" + pairs[at : at + 2])[0] for at in range(0, len(pairs), 2)]


def codes_of(plane: Plane, width: int, count: int) -> list[int]:
    together = int.from_bytes(plane.tobytes(), "little")
    return [together >> place * width & (1 << width) - 1 for place in range(count)]


def same(decoded: Tensor, expected: list[float]) -> bool:
    return torch.equal(decoded, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("values", TRIED)
def test_fp32_is_exact_and_bf16_is_torch_s_within_its_range(values: Tensor) -> None:
    count = len(values)
    exact = build_codec("fp32", density=1)
    assert torch.equal(exact.decode(exact.encode(values), count), values)
    half = build_codec("bf16", density=1)
    expected = values.to(torch.bfloat16)
    largest = torch.finfo(torch.bfloat16).max
    assert torch.equal(
        half.decode(half.encode(values), count), expected.float().clamp(-largest, largest)
    )


@pytest.mark.parametrize("values", TRIED)
def test_int8_is_at_most_half_a_scale_away(values: Tensor) -> None:
    codec = Int8()
    planes = codec.encode(values)
    decoded = codec.decode(planes, len(values))
    scales = np.repeat(bf16(planes[0]), 128)[: len(values)]
    codes = np.frombuffer(planes[1].tobytes(), np.int8)
    assert same(decoded, (scales * codes).tolist())
    clipped = scales == LARGEST_SCALE  # what is left of fp32's range above 127 scales
    errors = np.abs(values.numpy().astype(np.float64) - decoded.numpy())
    assert (errors <= np.where(clipped, 1, 0.5 + 1e-5) * scales).all()
    for block, scale in zip(values.split(128), scales[::128], strict=False):
        peak = float(block.abs().max())
        assert peak / 127 * (1 - 1e-6) <= scale <= peak / 127 * (1 + 2**-7) + 1e-40 or clipped.any()


@pytest.mark.parametrize("values", TRIED)
def test_e3m0_takes_the_nearest_power_of_two_and_the_scale_that_fits_best(values: Tensor) -> None:
    codec = build_codec("e3m0", density=1)
    planes = codec.encode(values)
    scales = bf16(planes[0])
    codes = codes_of(planes[1], 4, len(values))
    signed = [*LEVELS.tolist(), *(-LEVELS).tolist()]
    levels = np.array([signed[code] for code in codes])
    expected = np.repeat(scales, 128)[: len(values)] * levels
    assert same(codec.decode(planes, len(values)), expected.tolist())
    for at, scale in zip(range(0, len(values), 128), scales, strict=True):
        block = values.numpy()[at : at + 128].astype(np.float64)
        peak = np.abs(block).max()
        if peak == 0:
            assert not levels[at : at + 128].any()
            continue
        off = np.abs(np.abs(block)[:, None] / peak - LEVELS)
        chosen = np.abs(np.abs(block) / peak - np.abs(levels[at : at + 128]))
        assert (chosen <= off.min(axis=1) + 1e-6).all()
        best = np.linalg.lstsq(levels[at : at + 128, None], block, rcond=None)[0][0]
        assert scale == pytest.approx(min(best, 3.39e38), rel=2**-8, abs=1e-40)


@pytest.mark.parametrize("values", TRIED)
@pytest.mark.parametrize("bits", [1, 2])
def test_a_bin_stands_for_the_mean_of_its_members(values: Tensor, bits: Literal[1, 2]) -> None:
    codec = Centroids(bits)
    planes = codec.encode(values)
    tables, codes = bf16(planes[0]), codes_of(planes[1], bits, len(values))
    expected, bins = [], 1 << bits
    for group, at in enumerate(range(0, len(values), 1024)):
        members = values.numpy()[at : at + 1024].astype(np.float64)
        own = np.array(codes[at : at + 1024])
        sigma = np.float32(np.sqrt(np.mean(members**2)))
        edges = np.array([-sigma, 0, sigma] if bits == 2 else [0], np.float64)
        if sigma > 0:
            assert own.tolist() == np.searchsorted(edges, members, side="right").tolist()
        table = tables[group * bins : (group + 1) * bins]
        for code in range(bins):
            mean = members[own == code].mean() if (own == code).any() else 0
            assert table[code] == pytest.approx(mean, rel=2**-8, abs=1e-40)
        expected += [table[code] for code in own]
    assert same(codec.decode(planes, len(values)), expected)


def test_quantisers_are_as_good_as_the_best_for_normal_values() -> None:
    """Lloyd and Max's quantisers of so many levels have 0.3634 and 0.1175 of the variance left."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 17).astype(np.float32))
    for name, least in (("1bit", 0.3634), ("2bit", 0.1175)):
        codec = build_codec(name, density=1)  # type: ignore[arg-type]
        left = values - codec.decode(codec.encode(values), len(values))
        assert float(left.square().mean()) == pytest.approx(least, rel=0.01)
