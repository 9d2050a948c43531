"""Packed codes against one big integer that holds them all."""

from __future__ import annotations

import numpy as np
import pytest

from trainwright.comm.codecs.bits import pack, packed_bytes, unpack
from trainwright.comm.codecs.codec import BrokenPlanes


@pytest.mark.parametrize("width", range(17))
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_codes_lie_one_after_the_other_from_the_lowest_bit_on(width: int, count: int) -> None:
    codes = np.random.default_rng(width).integers(0, 1 << width, count).astype(np.uint16)
    together = sum(int(code) << place * width for place, code in enumerate(codes))
    plane = pack(codes, width)
    assert plane.dtype == np.uint8
    assert plane.tobytes() == together.to_bytes(packed_bytes(count, width), "little")
    assert unpack(plane, width, count).tolist() == codes.tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 12])
def test_planes_of_another_size_or_with_bits_after_the_last_code_are_refused(width: int) -> None:
    plane = pack(np.full(5, (1 << width) - 1, np.uint16), width)
    for wrong in (plane[:-1], np.append(plane, np.uint8(0))):
        with pytest.raises(BrokenPlanes, match="bytes instead of"):
            unpack(wrong, width, 5)
    plane[-1] |= 0x80
    with pytest.raises(BrokenPlanes, match="after the last"):
        unpack(plane, width, 5)
