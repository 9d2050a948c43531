"""Packing against slow, independent packings written with plain lists."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainwright.data.packing import Layout, pack, ranges

CASES = [
    ([5, 3, 9, 1, 4, 16, 7, 33, 2], 8),
    ([2] * 17, 8),
    ([8, 8, 8], 8),
    ([9, 17, 25], 8),  # each rest is one token
    ([40], 8),
    ([3], 8),
    ([1], 8),
    ([2, 3, 4], 1),
]


def random_cases(count: int) -> list[tuple[list[int], int]]:
    random = np.random.default_rng(7)
    cases = []
    for _ in range(count):
        length = int(random.integers(2, 40))
        documents = int(random.integers(1, 60))
        cases.append((random.integers(1, 3 * length, documents).tolist(), length))
    return cases


def rows_of(layout: Layout) -> list[list[tuple[int, int]]]:
    """Each row as (document, token) pairs."""
    rows = []
    for row in range(layout.rows):
        pairs: list[tuple[int, int]] = []
        for run in range(layout.first_run[row], layout.first_run[row + 1]):
            document, start = int(layout.document[run]), int(layout.start[run])
            pairs += [(document, start + i) for i in range(int(layout.length[run]))]
        rows.append(pairs)
    return rows


def slow_concat(lengths: list[int], order: list[int], sequence_length: int) -> list:
    tokens = [(document, i) for document in order for i in range(lengths[document])]
    rows = [tokens[i : i + sequence_length] for i in range(0, len(tokens), sequence_length)]
    return rows[:-1] if len(rows) > 1 and len(rows[-1]) == 1 else rows


def slow_pieces(lengths: list[int], order: list[int], sequence_length: int) -> list:
    pieces = []
    for document in order:
        tokens = [(document, i) for i in range(lengths[document])]
        cut = [tokens[i : i + sequence_length] for i in range(0, len(tokens), sequence_length)]
        pieces += cut[:-1] if len(cut) > 1 and len(cut[-1]) == 1 else cut
    return pieces


def slow_best_fit(lengths: list[int], order: list[int], sequence_length: int) -> list[int]:
    """The tokens in each row: one piece after the other, longest first, into the fullest row."""
    rows: list[int] = []
    sizes = sorted(map(len, slow_pieces(lengths, order, sequence_length)), reverse=True)
    for size in sizes:
        fitting = [row for row, filled in enumerate(rows) if filled + size <= sequence_length]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += size
        else:
            rows.append(size)
    return rows


@pytest.mark.parametrize(("lengths", "sequence_length"), CASES + random_cases(60))
def test_rows_are_those_of_a_slow_packing(lengths: list[int], sequence_length: int) -> None:
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    arguments = (np.array(lengths), order, sequence_length)
    slow = (lengths, order.tolist(), sequence_length)

    assert rows_of(pack("concat", *arguments)) == slow_concat(*slow)
    assert rows_of(pack("none", *arguments)) == slow_pieces(*slow)
    best_fit = pack("best-fit", *arguments)
    assert sorted(best_fit.filled.tolist()) == sorted(slow_best_fit(*slow))
    pieces = [
        tuple((int(d), int(s) + i) for i in range(int(n)))
        for d, s, n in zip(best_fit.document, best_fit.start, best_fit.length, strict=True)
    ]
    assert Counter(pieces) == Counter(map(tuple, slow_pieces(*slow)))


def test_best_fit_splits_only_documents_longer_than_a_row() -> None:
    lengths = np.random.default_rng(1).integers(2, 100, 500)
    layout = pack("best-fit", lengths, np.arange(500), 64)
    runs = np.bincount(layout.document)
    assert np.array_equal(runs > 1, lengths > 65)  # 65: the last token is a target only
    assert layout.filled.max() <= 64


def test_best_fit_needs_no_more_rows_than_an_order_that_shuffles() -> None:
    lengths = np.random.default_rng(2).integers(2, 300, 1000)
    orders = [np.random.default_rng(seed).permutation(1000) for seed in range(5)]
    assert len({pack("best-fit", lengths, order, 128).rows for order in orders}) == 1


def test_unshuffled_rows_begin_in_the_order_of_documents() -> None:
    layout = pack("best-fit", np.array([3, 5, 8, 2, 6, 4]), np.arange(6), 8)
    firsts = [min(d for d, _ in row) for row in rows_of(layout)]
    assert firsts == sorted(firsts)


def test_documents_may_be_listed_twice() -> None:
    layout = pack("best-fit", np.array([3, 5]), np.array([1, 0, 1, 0]), 8)
    assert Counter(layout.document.tolist()) == {0: 2, 1: 2}
    assert layout.filled.tolist() == [8, 8]


def test_a_hundred_thousand_documents() -> None:
    lengths = np.random.default_rng(3).integers(1, 3000, 100_000)
    order = np.random.default_rng(4).permutation(100_000)
    pieces = int(pack("none", lengths, order, 1024).length.sum())
    for packing in ("concat", "best-fit"):
        layout = pack(packing, lengths, order, 1024)
        assert layout.filled.max() <= 1024
        assert layout.length.sum() >= pieces
        assert layout.length.sum() / (layout.rows * 1024) > 0.99


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], dtype=int), np.array([], dtype=int)).tolist() == []
