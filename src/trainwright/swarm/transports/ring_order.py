"""In which order peers stand in the ring, so that its slowest link is as fast as can be.

A ring passes everything over every link, so its speed is that of the slowest: the order is the
bottleneck travelling salesman's. Up to ten peers it is found exactly, by dynamic programming over
sets (Held and Karp 1962); for more, by exchanging and moving peers while that helps.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import combinations
from statistics import median_low

_EXACT = 10  # peers: some 2^9 × 9² steps

Rates = Mapping[tuple[str, str], float]  # bytes/s from the first to the second
Cost = Callable[[str, str], float]


def ring_order(peers: Collection[str], rates: Rates) -> tuple[str, ...]:
    """Peers in the order in which data goes round, beginning with the first by name.

    Of the orders with the fastest slowest link, one with the least sum of seconds per byte; ties
    go to names, so that peers who know the same rates agree. Rates are rounded to powers of √2
    (noise would turn the ring about), and links not measured yet count as the median of others.
    """
    names = tuple(sorted(peers))
    if len(names) < 3:
        return names
    known = [rate for rate in rates.values() if rate > 0]
    usual = median_low(known) if known else 1.0

    def seconds(a: str, b: str) -> float:
        return 2.0 ** (-round(2 * math.log2(rates.get((a, b), 0) or usual)) / 2)

    if len(names) > _EXACT:
        return _improved(names, seconds)
    slowest, _ = _held_karp(names, seconds, max)

    def allowed(a: str, b: str) -> float:
        cost = seconds(a, b)
        return cost if cost <= slowest else math.inf

    return _held_karp(names, allowed, operator.add)[1]


def _held_karp(
    names: tuple[str, ...], cost: Cost, join: Callable[[float, float], float]
) -> tuple[float, tuple[str, ...]]:
    """The cheapest round trip: the best (cost, path) for each set of peers and the last of them."""
    first, others = names[0], names[1:]
    best: dict[tuple[frozenset[str], str], tuple[float, tuple[str, ...]]] = {
        (frozenset((name,)), name): (cost(first, name), (first, name)) for name in others
    }
    for size in range(2, len(names)):
        for visited in map(frozenset, combinations(others, size)):
            for last in visited:
                before = visited - {last}
                best[visited, last] = min(
                    (join(paid, cost(previous, last)), (*path, last))
                    for previous in before
                    for paid, path in (best[before, previous],)
                )
    everyone = frozenset(others)
    return min(
        (join(paid, cost(last, first)), path)
        for last in others
        for paid, path in (best[everyone, last],)
    )


def _improved(names: tuple[str, ...], seconds: Cost) -> tuple[str, ...]:
    """A good order of many: from each the nearest not visited yet; then runs of up to three peers
    are moved while the slowest link, or else the sum, gets better by it.
    """

    def cost(order: tuple[str, ...]) -> tuple[float, float]:
        links = [seconds(a, b) for a, b in zip(order, order[1:] + order[:1], strict=True)]
        return max(links), math.fsum(links)

    order, left = names[:1], set(names[1:])
    while left:
        nearest = min(left, key=lambda name: (seconds(order[-1], name), name))
        order, left = (*order, nearest), left - {nearest}
    better: tuple[str, ...] | None = order
    while better is not None:
        order, paid = better, cost(better)
        better = next((tried for tried in _moved(order) if cost(tried) < paid), None)
    return order


def _moved(order: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All orders with one run of up to three peers at another place; the first peer stays."""
    for length in (1, 2, 3):
        for start in range(1, len(order) - length + 1):
            run, rest = order[start : start + length], order[:start] + order[start + length :]
            for place in range(1, len(rest) + 1):
                yield rest[:place] + run + rest[place:]
