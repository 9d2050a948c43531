"""Codings of places against coders that write one bit after the other, and against entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainwright.comm.codecs.codec import BrokenPlanes, Plane
from trainwright.comm.codecs.index_coding import (
    Cut,
    IndexCoding,
    Places,
    Rice,
    TwelveBits,
    kept_in_all,
)

CUTS = (Cut(40, 4096, 64), Cut(3, 64, 1), Cut(1, 1, 1), Cut(2, 100, 100), Cut(1, 904, 14))
CODINGS = [Rice(), TwelveBits()]


def random_places(cuts: tuple[Cut, ...], seed: int) -> Places:
    """Evenly, or crowded where the seed is odd."""
    rng = np.random.default_rng(seed)
    found = []
    for cut in cuts:
        weights = np.ones(cut.length)
        if seed % 2:
            weights = np.exp(-8 * rng.random(cut.length))
        weights /= weights.sum()
        rows = [
            np.sort(rng.choice(cut.length, cut.kept, replace=False, p=weights))
            for _ in range(cut.rows)
        ]
        found.append(np.array(rows, np.int64))
    return found


def equal(found: Places, expected: Places) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def bit_by_bit(places: Places, width: int) -> bytes:
    """Golomb-Rice code, from the docstring, in strings of zeros and ones."""
    gaps = []
    for rows in places:
        for row in rows.tolist():
            gaps += [place - before - 1 for before, place in zip([-1, *row], row, strict=False)]
    low = "".join(format(gap % (1 << width), f"0{width}b")[::-1] if width else "" for gap in gaps)
    high = "".join("0" * (gap >> width) + "1" for gap in gaps)
    found = bytes([width])
    for bits in (low, high):
        bits += "0" * (-len(bits) % 8)
        found += bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_rice_code_is_that_of_a_coder_of_single_bits_and_the_shortest_of_all_widths(
    seed: int,
) -> None:
    places = random_places(CUTS, seed)
    plane = Rice().encode(places, CUTS)
    assert plane.tobytes() == bit_by_bit(places, int(plane[0]))
    assert plane.size <= min(len(bit_by_bit(places, width)) for width in range(12))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("coding", CODINGS, ids=["rice", "12 bits"])
def test_places_come_back(coding: IndexCoding, seed: int) -> None:
    for cuts in (CUTS, CUTS[:1], CUTS[2:3], ()):
        places = random_places(cuts, seed)
        plane = coding.encode(places, cuts)
        assert plane.size <= coding.most_bytes(cuts)
        assert equal(coding.decode(plane, cuts), places)


def test_twelve_bits_are_twelve_bits() -> None:
    places = random_places(CUTS, 0)
    flat = np.concatenate([each.reshape(-1) for each in places]).tolist()
    together = sum(place << 12 * at for at, place in enumerate(flat))
    plane = TwelveBits().encode(places, CUTS)
    assert int.from_bytes(plane.tobytes(), "little") == together
    assert plane.size == math.ceil(len(flat) * 12 / 8)


@pytest.mark.parametrize(("kept", "above"), [(4, 1.05), (32, 1.03), (64, 1.03), (1024, 1.06)])
def test_rice_needs_hardly_more_than_the_entropy_of_such_a_choice(kept: int, above: float) -> None:
    cuts = (Cut(400, 4096, kept),)
    floor = 400 * math.log2(math.comb(4096, kept)) / 8
    size = Rice().encode(random_places(cuts, 0), cuts).size
    assert floor < size < above * floor


@pytest.mark.parametrize("length", [5, 64, 4096])
def test_no_places_need_more_than_most_bytes(length: int) -> None:
    for kept in {1, 2, length // 3, length - 1, length}:
        cut = Cut(7, length, kept)
        rows = [
            np.arange(kept),
            np.arange(length - kept, length),
            np.append(np.arange(kept - 1), length - 1),
            np.arange(kept) * (length // kept),
        ]
        for row in rows:
            places = [np.tile(row.astype(np.int64), (7, 1))]
            plane = Rice().encode(places, (cut,))
            assert plane.size <= Rice().most_bytes((cut,))
            assert equal(Rice().decode(plane, (cut,)), places)


def broken(coding: IndexCoding, plane: Plane, cuts: tuple[Cut, ...]) -> str:
    with pytest.raises(BrokenPlanes) as found:
        coding.decode(plane, cuts)
    return str(found.value)


def test_places_twice_out_of_order_or_out_of_range_are_refused() -> None:
    cuts = (Cut(2, 100, 3),)
    for rows, reason in (
        ([[1, 1, 5], [0, 1, 2]], "ascend"),
        ([[1, 2, 5], [4, 3, 9]], "ascend"),
        ([[1, 2, 5], [1, 2, 100]], "beyond"),
    ):
        plane = TwelveBits().encode([np.array(rows, np.int64)], cuts)
        assert reason in broken(TwelveBits(), plane, cuts)
    plane = Rice().encode([np.array([[1, 2, 5], [1, 2, 100]], np.int64)], cuts)
    assert "beyond" in broken(Rice(), plane, cuts)


def test_rice_code_with_too_few_or_too_many_ends_or_bytes_is_refused() -> None:
    cuts = (Cut(2, 100, 3),)
    plane = Rice().encode([np.array([[1, 2, 5], [4, 50, 99]], np.int64)], cuts)
    zero = np.zeros(1, np.uint8)
    assert "0 places" in broken(Rice(), np.append(plane[:-2], [zero, zero]), cuts)
    assert "none can be" in broken(Rice(), plane[:0], cuts)
    assert "none can be" in broken(Rice(), np.tile(plane, 20), cuts)
    wide = plane.copy()
    wide[0] = 13
    assert "none can be" in broken(Rice(), wide, cuts)
    assert kept_in_all(cuts) == 6
    more = plane.copy()
    more[-2] = 255
    assert "and 6 kept" in broken(Rice(), more, cuts)
    short = Rice().encode([np.array([[0, 1, 2], [0, 1, 2]], np.int64)], cuts)
    assert "and 6 kept" in broken(Rice(), np.append(short, zero), cuts)
