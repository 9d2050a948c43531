"""The ring's order against all permutations, and what a slow link, noise and silence make of it."""

from __future__ import annotations

import itertools
import math
import random

from trainwright.swarm.transports.ring_order import ring_order


def links(order):
    return list(zip(order, (*order[1:], order[0]), strict=True))


def drawn(seed: int, peers: str) -> dict[tuple[str, str], float]:
    """Rates that are powers of √2, which is as finely as they are told apart."""
    draw = random.Random(seed)
    return {pair: 2.0 ** (draw.randint(20, 50) / 2) for pair in itertools.permutations(peers, 2)}


def cost(order, rates) -> tuple[float, float]:
    seconds = [1 / rates[link] for link in links(order)]
    return max(seconds), math.fsum(seconds)


def test_it_is_the_best_of_all_permutations():
    for seed in range(40):
        peers = "abcdefg"[: 3 + seed % 5]
        rates = drawn(seed, peers)
        best = min(cost((peers[0], *rest), rates) for rest in itertools.permutations(peers[1:]))
        found = cost(ring_order(peers, rates), rates)
        assert found[0] == best[0]
        assert math.isclose(found[1], best[1])


def test_many_peers_get_an_order_near_the_best():
    peers = [f"p{at:02}" for at in range(16)]
    draw = random.Random(1)
    # Two places with fast links inside and slow ones between, two of them better than the rest.
    rates = {
        (a, b): 1e8 if (a < "p08") == (b < "p08") else draw.choice([1e6, 2e6])
        for a, b in itertools.permutations(peers, 2)
    }
    order = ring_order(peers, rates)
    assert sorted(order) == peers
    between = [link for link in links(order) if (link[0] < "p08") != (link[1] < "p08")]
    assert len(between) == 2  # there and back, once
    assert all(rates[link] == 2e6 for link in between)


def test_a_slow_link_is_left_out():
    rates = dict.fromkeys(itertools.permutations("abcd", 2), 1e7) | {("a", "b"): 1e5}
    assert ("a", "b") not in links(ring_order("abcd", rates))


def test_noise_does_not_turn_it_and_all_who_know_the_same_agree():
    rates = drawn(3, "abcdef")
    draw = random.Random(4)
    noisy = {pair: rate * draw.uniform(0.9, 1.1) for pair, rate in rates.items()}
    assert ring_order("fedcba", noisy) == ring_order("abcdef", dict(reversed(rates.items())))


def test_links_that_nobody_measured_count_as_usual_ones():
    rates = {("a", "b"): 1e4, ("b", "c"): 1e7, ("a", "c"): 1e7}
    assert ("a", "b") not in links(ring_order("abc", rates))
    assert ring_order("cba", {}) == ("a", "b", "c")
    assert ring_order("ba", {}) == ("a", "b") and ring_order("", {}) == ()
