"""Documents to rows: which tokens of which documents stand in each row of an epoch.

Pure functions of document lengths and their order; nothing here reads a token.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Packing = Literal["concat", "best-fit", "none"]


@dataclass(frozen=True)
class Layout:
    """Rows as runs of tokens. Run `i` is `length[i]` tokens of document `document[i]` from its
    token `start[i]` on; row `r` holds runs `first_run[r]` up to `first_run[r + 1]`, end to end.
    """

    document: Ints
    start: Ints
    length: Ints
    first_run: Ints  # [rows + 1]

    @property
    def rows(self) -> int:
        """Rows in the layout."""
        return len(self.first_run) - 1

    @property
    def filled(self) -> Ints:
        """Tokens in each row; the rest of it is padding."""
        ends = np.concatenate([[0], np.cumsum(self.length)])
        return np.diff(ends[self.first_run])

    def reordered(self, order: Ints) -> Layout:
        """The same rows in another order."""
        runs = np.diff(self.first_run)[order]
        taken = ranges(self.first_run[order], runs)
        first_run = np.concatenate([[0], np.cumsum(runs)])
        return Layout(self.document[taken], self.start[taken], self.length[taken], first_run)


def ranges(first: Ints, counts: Ints) -> Ints:
    """`counts[0]` numbers from `first[0]` on, then `counts[1]` numbers from `first[1]` on, …"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts - first, counts)


def pack(packing: Packing, lengths: Ints, order: Ints, sequence_length: int) -> Layout:
    """Lay documents out in rows of `sequence_length` tokens.

    `lengths` [documents] in tokens, each at least 1; `order` lists the documents to pack, in
    order, and may repeat them. Every listed document is laid out whole, with one exception that
    loses no target: a document's last token is left out where it would open a row of its own,
    because nothing follows it and its predecessor, in the row before, has it as target.
    """
    return _PACKINGS[packing](lengths[order], order, sequence_length)


def pack_concat(lengths: Ints, documents: Ints, sequence_length: int) -> Layout:
    """Documents end to end, cut into full rows; only the last row has padding."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1])
    rows = _ceil(total, sequence_length)
    if rows > 1 and (rows - 1) * sequence_length == total - 1:
        rows -= 1  # it holds one token, the last of the last document: no context and no target
    first_row = begins // sequence_length
    runs = (ends - 1) // sequence_length - first_row + 1
    which = np.repeat(np.arange(len(lengths)), runs)
    row = ranges(first_row, runs)
    begin = np.maximum(begins[which], row * sequence_length)
    end = np.minimum(ends[which], (row + 1) * sequence_length)
    kept = row < rows
    return Layout(
        document=documents[which][kept],
        start=(begin - begins[which])[kept],
        length=(end - begin)[kept],
        first_run=np.searchsorted(row[kept], np.arange(rows + 1)),
    )


def pack_alone(lengths: Ints, documents: Ints, sequence_length: int) -> Layout:
    """A row for each document; a longer one takes several rows, one after the other."""
    which, start, length = _pieces(lengths, sequence_length)
    return Layout(documents[which], start, length, np.arange(len(which) + 1))


def pack_best_fit(lengths: Ints, documents: Ints, sequence_length: int) -> Layout:
    """Best-fit decreasing: each document, longest first, into the fullest row that still has room.

    Documents are not split, unless they are longer than a row: those give full rows and one rest.
    The number of rows depends on the lengths alone, not on their order (Johnson 1973; for language
    models Ding et al. 2024, "Fewer Truncations Improve Language Modeling").

    Pieces of one length are placed together, and so are rows with the same room, so that the time
    goes with the number of different lengths rather than of documents.
    """
    which, start, length = _pieces(lengths, sequence_length)
    longest_first = np.argsort(-length, kind="stable")
    sizes, counts = np.unique(-length[longest_first], return_counts=True)
    row_of = np.empty(len(which), dtype=np.int64)  # in the order of `longest_first`
    open_rows: dict[int, list[Ints]] = {}  # room left → rows with that room
    rooms: list[int] = []  # the keys of `open_rows`, ascending
    rows = placed = 0
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        until = placed + count
        while placed < until:
            fitting = bisect_left(rooms, size)
            if fitting < len(rooms):
                room = rooms.pop(fitting)
                available = np.concatenate(open_rows.pop(room))
            else:
                room = sequence_length
                fresh = _ceil(until - placed, room // size)
                available = np.arange(rows, rows + fresh, dtype=np.int64)
                rows += fresh
            # The fullest fitting row stays the fullest fitting one until it has no room for `size`.
            each = room // size
            used = min(len(available), _ceil(until - placed, each))
            here = min(used * each, until - placed)
            row_of[placed : placed + here] = np.repeat(available[:used], each)[:here]
            placed += here
            last = here - (used - 1) * each  # pieces in the last of the rows used
            _open(open_rows, rooms, room - each * size, available[: used - 1])
            _open(open_rows, rooms, room - last * size, available[used - 1 : used])
            _open(open_rows, rooms, room, available[used:])
    by_row = np.argsort(row_of, kind="stable")
    taken = longest_first[by_row]
    first_run = np.searchsorted(row_of[by_row], np.arange(rows + 1))
    layout = Layout(documents[which[taken]], start[taken], length[taken], first_run)
    # Rows in the order of the first document in each, so that unshuffled data stays in order.
    return layout.reordered(np.argsort(np.minimum.reduceat(taken, first_run[:-1]), kind="stable"))


_PACKINGS: dict[Packing, Callable[[Ints, Ints, int], Layout]] = {
    "concat": pack_concat,
    "best-fit": pack_best_fit,
    "none": pack_alone,
}


def _pieces(lengths: Ints, sequence_length: int) -> tuple[Ints, Ints, Ints]:
    """Documents cut into pieces of at most a row: (index of the document, start, length)."""
    # A rest of one token is left out: the last token, already the target of the piece before.
    targets = np.maximum(lengths - 1, 1)
    pieces = -(-targets // sequence_length)
    which = np.repeat(np.arange(len(lengths)), pieces)
    start = ranges(np.zeros_like(pieces), pieces) * sequence_length
    return which, start, np.minimum(lengths[which] - start, sequence_length)


def _ceil(amount: int, unit: int) -> int:
    return -(-amount // unit)


def _open(open_rows: dict[int, list[Ints]], rooms: list[int], room: int, rows: Ints) -> None:
    if room == 0 or len(rows) == 0:
        return
    if room not in open_rows:
        open_rows[room] = []
        insort(rooms, room)
    open_rows[room].append(rows)
