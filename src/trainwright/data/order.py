"""The order of documents and rows: pure functions of seed, epoch and counts.

Everything here is random access: row 10^9 of a mixture is found without walking to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Rows over which a mixture keeps its shares exactly; fewer would round small weights badly.
_FEWEST_ROWS = 1024


def shuffled(count: int, *key: int | str) -> Ints:
    """A permutation of `range(count)` that `key` alone decides.

    The numbers are SplitMix64's (Steele et al. 2014), computed here, so that an order never
    changes with a version of numpy.
    """
    return np.argsort(_random_numbers(count, *key), kind="stable")


def _random_numbers(count: int, *key: int | str) -> NDArray[np.uint64]:
    name = "\0".join(map(str, key)).encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Interleaving:
    """How the rows of several streams alternate, in given shares.

    `shares` are of rows and sum to 1. Over each period of `rows` rows (a whole number of epochs)
    stream `s` gives exactly `counts[s]` rows, at least one, spread evenly with some jitter.
    """

    shares: tuple[float, ...]
    rows_per_epoch: int
    seed: int
    shuffle: bool

    @property
    def rows(self) -> int:
        """Rows in a period."""
        return self.rows_per_epoch * -(-_FEWEST_ROWS // self.rows_per_epoch)

    @cached_property
    def counts(self) -> Ints:
        """Rows of each stream in a period: its share, rounded so that they sum to `rows`."""
        wanted = np.array(self.shares) * self.rows
        counts = np.maximum(np.floor(wanted), 1).astype(np.int64)
        while counts.sum() < self.rows:
            counts[np.argmax(wanted - counts)] += 1
        while counts.sum() > self.rows:
            counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
        return counts

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """For each row of the mixture: its stream, and the number of the row in that stream."""
        periods, places = np.divmod(rows, self.rows)
        streams, numbers = np.empty_like(rows), np.empty_like(rows)
        for period in np.unique(periods).tolist():
            here = periods == period
            stream_of, number_of = _period(self, period)
            streams[here] = stream_of[places[here]]
            numbers[here] = number_of[places[here]] + period * self.counts[streams[here]]
        return streams, numbers


@dataclass(frozen=True)
class EndToEnd:
    """The rows of several streams one after the other, once: held-out data of several sources."""

    counts: tuple[int, ...]  # rows of each stream

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all streams."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each stream's share of the rows."""
        return tuple(count / self.rows_per_epoch for count in self.counts)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """For each row: its stream, and the number of the row in that stream."""
        counts = np.array(self.counts, np.int64)
        ends = np.cumsum(counts)
        streams = np.searchsorted(ends, rows, side="right")
        return streams, rows - (ends - counts)[streams]


@lru_cache(maxsize=4)
def _period(mixture: Interleaving, period: int) -> tuple[Ints, Ints]:
    """Stream and number in that stream for every row of one period."""
    times, streams, numbers = [], [], []
    for stream, count in enumerate(mixture.counts.tolist()):
        within = np.full(count, 0.5)
        if mixture.shuffle:
            key = (mixture.seed, "mixture", stream, period)
            within = _random_numbers(count, *key) / 2.0**64
        times.append((np.arange(count) + within) / count)
        streams.append(np.full(count, stream))
        numbers.append(np.arange(count))
    order = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(streams)[order], np.concatenate(numbers)[order]


def row_shares(weights: Sequence[float], tokens_per_row: Sequence[float]) -> tuple[float, ...]:
    """Shares of rows that give each stream its weight in tokens, though rows are not all full."""
    rows = np.array(weights) / np.array(tokens_per_row)
    return tuple((rows / rows.sum()).tolist())
