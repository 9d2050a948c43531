"""Orders and mixtures: against SplitMix64 in plain integers, and by counting."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from trainwright.data.order import EndToEnd, Interleaving, row_shares, shuffled


def slow_shuffle(count: int, *key: object) -> list[int]:
    mask = 2**64 - 1
    name = "\0".join(map(str, key)).encode()
    state = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return sorted(range(count), key=lambda i: numbers[i])


def test_shuffle_is_splitmix64() -> None:
    assert shuffled(500, 42, "documents", 0, 3).tolist() == slow_shuffle(500, 42, "documents", 0, 3)


def test_every_part_of_the_key_changes_the_order() -> None:
    keys = [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1), (11, "a", 0)]
    orders = {tuple(shuffled(50, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_all_places_are_equally_likely() -> None:
    first = [int(shuffled(10, seed, "x")[0]) for seed in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, standard deviation 13.4


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.1), (0.999, 0.001), (1 / 3, 1 / 3, 1 / 3), (1.0,)])
def test_interleaving_keeps_shares_and_numbers_rows_in_order(shares, shuffle) -> None:
    mixture = Interleaving(shares, rows_per_epoch=50, seed=3, shuffle=shuffle)
    rows = np.arange(2 * mixture.rows)
    streams, numbers = mixture.locate(rows)
    counts = np.bincount(streams[: mixture.rows], minlength=len(shares))
    assert counts.sum() == mixture.rows
    assert np.abs(counts / mixture.rows - shares).max() <= 1 / mixture.rows
    for stream in range(len(shares)):
        # Each stream is read in order and without gaps, over the border of periods too.
        assert numbers[streams == stream].tolist() == list(range((streams == stream).sum()))
    picked = np.random.default_rng(0).permutation(rows)[:40]
    again = mixture.locate(picked)
    assert np.array_equal(again[0], streams[picked]) and np.array_equal(again[1], numbers[picked])


def test_a_tiny_weight_is_not_rounded_away() -> None:
    counts = Interleaving((0.99999, 0.00001), rows_per_epoch=3, seed=0, shuffle=True).counts
    assert counts.tolist() == [1025, 1]


def test_streams_alternate_evenly() -> None:
    streams, _ = Interleaving((0.5, 0.5), 1024, seed=1, shuffle=True).locate(np.arange(1024))
    windows = streams.reshape(-1, 32).sum(axis=1)
    assert windows.min() >= 12 and windows.max() <= 20


def test_row_shares_give_weights_in_tokens() -> None:
    shares = row_shares([3.0, 1.0], [100.0, 25.0])
    tokens = np.array(shares) * [100.0, 25.0]
    assert np.allclose(tokens / tokens.sum(), [0.75, 0.25])
    assert sum(shares) == pytest.approx(1.0)


def test_streams_end_to_end_are_read_one_after_the_other() -> None:
    order = EndToEnd((3, 1, 4))
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    streams, numbers = order.locate(np.arange(8))
    assert list(zip(streams.tolist(), numbers.tolist(), strict=True)) == expected
    assert order.rows_per_epoch == 8 and sum(order.shares) == 1
    assert [each.tolist() for each in order.locate(np.array([7, 3]))] == [[2, 1], [3, 0]]
