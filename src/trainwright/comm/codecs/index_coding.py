"""Which values of each chunk are kept: their places as bytes, and back.

Both codings take and give places as a list of int64 [rows, kept], one for each run of equal chunks
(`Cut`), ascending in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainwright.comm.codecs.bits import pack, packed_bytes, unpack
from trainwright.comm.codecs.codec import BrokenPlanes, Plane

Places = list[NDArray[np.int64]]
LONGEST = 4096  # values of a chunk, so that 12 bits name one
WIDTHS = range(12)  # of a gap's low bits


@dataclass(frozen=True)
class Cut:
    """So many chunks in a row of `length` values each, of which `kept` are kept."""

    rows: int
    length: int
    kept: int


def kept_in_all(cuts: Sequence[Cut]) -> int:
    """Values that all these chunks keep."""
    return sum(cut.rows * cut.kept for cut in cuts)


class IndexCoding(Protocol):
    """Places as one plane."""

    def encode(self, places: Places, cuts: Sequence[Cut]) -> Plane:
        """The plane of such places."""
        ...

    def decode(self, plane: Plane, cuts: Sequence[Cut]) -> Places:
        """The places. Raises BrokenPlanes for what no places are written as."""
        ...

    def most_bytes(self, cuts: Sequence[Cut]) -> int:
        """The most bytes that the plane can have."""
        ...


class TwelveBits:
    """Every place in 12 bits."""

    def encode(self, places: Places, cuts: Sequence[Cut]) -> Plane:
        """See `IndexCoding`."""
        flat = np.concatenate([each.reshape(-1) for each in places] or [np.empty(0, np.int64)])
        return pack(flat.astype(np.uint16), 12)

    def decode(self, plane: Plane, cuts: Sequence[Cut]) -> Places:
        """See `IndexCoding`."""
        places = _split(unpack(plane, 12, kept_in_all(cuts)).astype(np.int64), cuts)
        for each, cut in zip(places, cuts, strict=True):
            if (np.diff(each, axis=1) <= 0).any():
                raise BrokenPlanes("places that do not ascend")
            _check_range(each, cut)
        return places

    def most_bytes(self, cuts: Sequence[Cut]) -> int:
        """See `IndexCoding`."""
        return packed_bytes(kept_in_all(cuts), 12)


class Rice:
    """The gaps between places in Golomb-Rice code (Rice and Plaunt 1971): 7.5 bits a place where 64
    of 4096 are kept evenly, of which no coder needs less than 7.4.

    A gap g is written as g >> w in unary and its w low bits; w is the best for all gaps. One plane:
    the byte w, the low bits of all gaps, then their unary parts, g >> w zeros and a one each. Apart
    they need no loop over codes. At w = 0 the ones are a bit map of what is kept.
    """

    def encode(self, places: Places, cuts: Sequence[Cut]) -> Plane:
        """See `IndexCoding`."""
        gaps = np.concatenate(
            [np.diff(each, axis=1, prepend=-1).reshape(-1) - 1 for each in places]
            or [np.empty(0, np.int64)]
        )
        width = min(
            WIDTHS, key=lambda each: _rice_bytes(len(gaps), int((gaps >> each).sum()), each)
        )
        ends = np.cumsum((gaps >> width) + 1) - 1
        bits = np.zeros(ends[-1] + 1 if len(ends) else 0, np.uint8)
        bits[ends] = 1
        low = pack((gaps & (1 << width) - 1).astype(np.uint16), width)
        head = np.array([width], np.uint8)
        return np.concatenate([head, low, np.packbits(bits, bitorder="little")])

    def decode(self, plane: Plane, cuts: Sequence[Cut]) -> Places:
        """See `IndexCoding`."""
        total = kept_in_all(cuts)
        if not 1 <= plane.size <= self.most_bytes(cuts) or plane[0] not in WIDTHS:
            raise BrokenPlanes(f"{plane.size} bytes of places, of which none can be written so")
        width = int(plane[0])
        split = 1 + packed_bytes(total, width)
        low = unpack(plane[1:split], width, total)
        unary = plane[split:]
        ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
        needed = packed_bytes(int(ends[-1]) + 1, 1) if len(ends) else 0
        if len(ends) != total or unary.size != needed:
            raise BrokenPlanes(f"{len(ends)} places are written, and {total} kept")
        gaps = (np.diff(ends, prepend=-1) - 1 << width) + low
        places = [np.cumsum(each + 1, axis=1) - 1 for each in _split(gaps, cuts)]
        for each, cut in zip(places, cuts, strict=True):
            _check_range(each, cut)
        return places

    def most_bytes(self, cuts: Sequence[Cut]) -> int:
        """See `IndexCoding`: the best of what each w needs at worst, a row of gaps of `length −
        kept` together.
        """
        worst = []
        for width in WIDTHS:
            zeros = sum(cut.rows * (cut.length - cut.kept >> width) for cut in cuts)
            worst.append(_rice_bytes(kept_in_all(cuts), zeros, width))
        return min(worst)


def _rice_bytes(count: int, zeros: int, width: int) -> int:
    """Bytes of so many gaps with `zeros` in all their unary parts."""
    return 1 + packed_bytes(count, width) + packed_bytes(count + zeros, 1)


def _split(flat: NDArray[np.int64], cuts: Sequence[Cut]) -> Places:
    """[rows, kept] for each cut, of values that lie one after the other."""
    found, start = [], 0
    for cut in cuts:
        stop = start + cut.rows * cut.kept
        found.append(flat[start:stop].reshape(cut.rows, cut.kept))
        start = stop
    return found


def _check_range(places: NDArray[np.int64], cut: Cut) -> None:
    """Of ascending places the last tells for all."""
    if places.size and places[:, -1].max() >= cut.length:
        raise BrokenPlanes(f"a place beyond the {cut.length} values of its chunk")
