"""The chunked DCT against scipy's, against whole numbers, and against its own inverse."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from trainwright.comm.codecs.centroids import Centroids
from trainwright.comm.codecs.codec import BrokenPlanes
from trainwright.comm.codecs.dct import BITS, ChunkedDCT, DctTopK, side_of, table
from trainwright.comm.codecs.dense import Dense
from trainwright.comm.codecs.index_coding import Rice
from trainwright.comm.codecs.top_k import TopK

SHAPES = [
    (128, 192),
    (192,),
    (),
    (65, 7),
    (3, 64, 32),
    (1009, 2),
    (2, 3, 12, 10),
    (64, 128),
    (0, 5),
]


def random(shapes: list[tuple[int, ...]], seed: int = 0) -> Tensor:
    count = sum(math.prod(shape) for shape in shapes)
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal(count) * 0.02).astype(np.float32))


def by_scipy(values: Tensor, shapes: list[tuple[int, ...]]) -> dict[tuple[int, int], np.ndarray]:
    """fp64 coefficients by size of chunk, chunk by chunk with plain slices."""
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    start = 0
    for shape in shapes:
        size = math.prod(shape)
        stack = values[start : start + size].numpy().astype(np.float64)
        start += size
        height, width = (1, 1, *shape)[-2:]
        if not size:
            continue
        a, b = (max(d for d in range(1, 65) if side % d == 0) for side in (height, width))
        for matrix in stack.reshape(-1, height, width):
            for top in range(0, height, a):
                for left in range(0, width, b):
                    chunk = matrix[top : top + a, left : left + b]
                    found.setdefault((a, b), []).append(scipy.fft.dctn(chunk, norm="ortho"))
    return {chunk: np.stack(each) for chunk, each in found.items()}


def test_coefficients_are_scipy_s_in_the_documented_order() -> None:
    values = random(SHAPES)
    transform = ChunkedDCT(SHAPES)
    expected = by_scipy(values, SHAPES)
    flat = np.concatenate([each.reshape(-1) for each in expected.values()])
    found = transform.forward(values)
    assert transform.count == len(values) == len(found)
    assert np.abs(found.numpy() - flat).max() < 2e-7 * np.abs(flat).max()
    assert transform.chunks == [(len(each), each[0].size) for each in expected.values()]


def test_the_inverse_brings_values_back() -> None:
    for scale in (1.0, 1e-30, 1e30, 1e-40):
        values = random(SHAPES) * scale
        transform = ChunkedDCT(SHAPES)
        back = transform.inverse(transform.forward(values))
        worst = float((back - values).abs().max() / values.abs().max())
        assert worst < (3e-7 if scale > 1e-40 else 1e-2)  # there fp32 itself has few bits
    nothing = transform.inverse(torch.zeros(transform.count))
    assert torch.equal(nothing, torch.zeros(transform.count))


def in_whole_numbers(chunk: np.ndarray) -> np.ndarray:
    """The inverse with Python's integers and fractions of two, which nothing can round."""

    def integers(matrix: list[list[float]]) -> tuple[list[list[int]], int]:
        exponent = math.frexp(max(abs(each) for row in matrix for each in row))[1] - BITS
        return [[round(math.ldexp(each, -exponent)) for each in row] for row in matrix], exponent

    height, width = chunk.shape
    tall = [[int(each) for each in row] for row in table(height)]
    wide = [[int(each) for each in row] for row in table(width)]
    whole, exponent = integers(chunk.tolist())
    half = [
        [
            sum(row[f] * wide[f][p] for f in range(width)) * 2.0 ** (exponent - BITS)
            for p in range(width)
        ]
        for row in whole
    ]
    whole, exponent = integers(half)
    return np.array(
        [
            [
                sum(tall[f][q] * whole[f][p] for f in range(height)) * 2.0 ** (exponent - BITS)
                for p in range(width)
            ]
            for q in range(height)
        ],
        np.float32,
    )


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_exact_whatever_order_a_machine_takes_them_in(seed: int) -> None:
    """Coefficients that use up the room there is, too: all as large as the largest."""
    values = random([(64, 64)], seed).numpy()
    if seed == 1:
        values = np.sign(values) * np.float32(1 - 2**-24)
    if seed == 2:
        values = np.ones_like(values)
    transform = ChunkedDCT([(64, 64)])
    found = transform.inverse(torch.from_numpy(values))
    expected = in_whole_numbers(values.reshape(64, 64))
    assert np.array_equal(found.numpy().reshape(64, 64), expected)


def test_no_sum_of_products_can_leave_fp64_s_whole_numbers() -> None:
    for side in range(1, 65):
        sums = max(np.abs(table(side)).sum(axis=axis).max() for axis in (0, 1))
        assert sums * 2**BITS <= 2**53


def test_the_tables_are_rounded_alike_on_every_machine() -> None:
    """No entry is so near to the middle between integers that a cosine's last bits matter."""
    with mpmath.workdps(30):
        for side in range(1, 65):
            turn = [
                mpmath.sqrt(mpmath.mpf(2) / side) * mpmath.cos(mpmath.pi * angle / (2 * side))
                for angle in range(4 * side)
            ]
            first = mpmath.sqrt(mpmath.mpf(1) / side)
            for frequency, row in enumerate(table(side).tolist()):
                for place, entry in enumerate(row):
                    exact = turn[(2 * place + 1) * frequency % (4 * side)] if frequency else first
                    assert abs(exact * 2**BITS - int(entry)) < 0.5 - 1e-7


def test_sides_are_the_largest_divisors_up_to_64() -> None:
    for size in range(1, 700):
        assert side_of(size) == max(side for side in range(1, 65) if size % side == 0)


def test_the_codec_keeps_the_largest_coefficients_of_every_chunk() -> None:
    values = random(SHAPES)
    codec = DctTopK(SHAPES, density=1 / 64, values=Dense("fp32"))
    planes = codec.encode(values)
    found = codec.coefficients(planes).numpy()
    start = 0
    for chunks in by_scipy(values, SHAPES).values():
        chunks = chunks.reshape(len(chunks), -1)
        kept = max(1, round(chunks.shape[1] / 64))
        for chunk in chunks:
            own = found[start : start + len(chunk)]
            largest = np.sort(np.argsort(-np.abs(chunk))[:kept])
            assert np.flatnonzero(own).tolist() == largest.tolist()
            assert np.allclose(own[largest], chunk[largest], rtol=1e-5)
            start += len(chunk)
    assert sum(plane.size for plane in planes) <= codec.most_bytes(codec.count)
    again = codec.transform.inverse(codec.coefficients(planes))
    assert torch.equal(codec.decode(planes, codec.count), again)


@pytest.mark.parametrize("values", [Dense("bf16"), Centroids(1)], ids=["bf16", "1bit"])
def test_messages_are_far_smaller_than_the_releases(values: Dense | Centroids) -> None:
    """DeMo's release sends 12 bytes for each coefficient, Psyche's DisTrO 17 bits."""
    codec = DctTopK([(1024, 1024)], density=32 / 4096, values=values)
    size = sum(plane.size for plane in codec.encode(random([(1024, 1024)])))
    release = 32 * 256 * (12 if values.name == "bf16" else 17 / 8)
    assert release / size > (3.9 if values.name == "bf16" else 1.7)


def test_values_beyond_fp32_are_refused() -> None:
    codec = DctTopK([(64, 64)], density=1.0, values=Dense("fp32"))
    flat = torch.zeros(4096)
    flat[:2] = 3e38
    top = TopK("", 1.0, Rice(), Dense("fp32"))
    with pytest.raises(BrokenPlanes, match="not finite"):
        codec.decode(top.encode(torch.full((4096,), 3e38)), 4096)
    assert torch.isfinite(codec.decode(top.encode(flat * 1e-3), 4096)).all()
