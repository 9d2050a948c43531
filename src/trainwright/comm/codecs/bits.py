"""Codes of a few bits each, packed without gaps: the lowest bit of the first code comes first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.comm.codecs.codec import BrokenPlanes, Plane
from trainwright.comm.codecs.planes import blocks

Codes = NDArray[np.unsignedinteger[Any]]  # [count]


def packed_bytes(count: int, width: int) -> int:
    """Bytes of so many codes of `width` bits."""
    return (count * width + 7) // 8


def pack(codes: Codes, width: int) -> Plane:
    """Codes [count], each below 2^width with width from 0 to 16, as bytes [⌈count · width / 8⌉]."""
    if width in (1, 2, 4, 8):  # whole codes in a byte: no need to look at single bits
        rows = blocks(codes.astype(np.uint8), 8 // width)
        found = rows[:, 0].copy()
        for place in range(1, 8 // width):
            found |= rows[:, place] << np.uint8(place * width)
        return found
    bits = np.unpackbits(codes.astype("<u2").view(np.uint8), bitorder="little")
    return np.packbits(bits.reshape(-1, 16)[:, :width], bitorder="little")


def unpack(plane: Plane, width: int, count: int) -> Codes:
    """The codes that `pack` wrote: uint8 for widths of 1, 2, 4 and 8, otherwise uint16.

    Raises BrokenPlanes if the plane has another size than theirs, or bits set after the last.
    """
    needed = packed_bytes(count, width)
    if plane.size != needed:
        raise BrokenPlanes(f"{plane.size} bytes instead of {needed} of codes of {width} bits")
    used = count * width % 8
    if used and plane[-1] >> used:
        raise BrokenPlanes("bits are set after the last code")
    if width in (1, 2, 4, 8):
        found = np.empty((needed, 8 // width), np.uint8)
        for place in range(8 // width):
            found[:, place] = plane >> np.uint8(place * width) & np.uint8((1 << width) - 1)
        return found.reshape(-1)[:count]
    bits = np.zeros((count, 16), np.uint8)
    bits[:, :width] = np.unpackbits(plane, count=count * width, bitorder="little").reshape(
        count, width
    )
    return np.packbits(bits, axis=1, bitorder="little").view("<u2").reshape(-1)
