"""Contributions into one, against numpy and scipy, and what a liar can make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from trainwright.swarm.aggregation import RULES, clip_to_median, combine
from trainwright.swarm.methods.method import Received
from trainwright.swarm.sums import dot, norm


def made(count: int, size: int = 500, seed: int = 0, spread: float = 1.0) -> list[Received]:
    """Contributions with something in common; tokens 100, 101, …"""
    draws = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=draws)
    return [
        Received(f"p{index}", common + spread * torch.randn(size, generator=draws), 100.0 + index)
        for index in range(count)
    ]


def rows(received: list[Received]) -> np.ndarray:
    return np.stack([each.values.double().numpy() for each in received])


@pytest.mark.parametrize("size", [1, 127, 128, 129, 65_536, 100_003])
def test_sums_are_exact_sums(size: int) -> None:
    draws = torch.Generator().manual_seed(size)
    a, b = torch.randn(size, generator=draws), torch.randn(size, generator=draws)
    expected = math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert dot(a, b) == pytest.approx(expected, rel=1e-11, abs=1e-10)
    assert norm(a) == pytest.approx(math.sqrt(math.fsum(x * x for x in a.tolist())), rel=1e-14)


def test_sums_do_not_depend_on_threads_or_memory() -> None:
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(norm(values))
            found.add(norm(torch.stack([values, values], 1)[:, 0]))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_sums_are_added_in_the_order_that_is_written_down() -> None:
    for seed in range(20):  # in another order most of them have another last bit
        values = torch.randn(777, generator=torch.Generator().manual_seed(seed))
        columns = [[float(x) ** 2 for x in values[start::128].tolist()] for start in range(128)]
        halves = [tree([*column, *[0.0] * (8 - len(column))]) for column in columns]
        assert norm(values) == math.sqrt(tree(halves))


def tree(values: list[float]) -> float:
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def test_the_mean_is_weighted_by_tokens() -> None:
    received = made(5)
    expected = np.average(rows(received), axis=0, weights=[each.weight for each in received])
    np.testing.assert_allclose(combine(received).numpy(), expected, rtol=2e-6, atol=1e-6)


def test_one_contribution_comes_out_as_it_went_in() -> None:
    received = made(1)
    for rule in RULES:
        assert torch.equal(combine(received, aggregation=rule), received[0].values)


@pytest.mark.parametrize(("count", "share"), [(3, 1 / 3), (4, 0.25), (7, 1 / 7), (9, 0.25)])
def test_the_trimmed_mean_is_scipys(count: int, share: float) -> None:
    received = made(count)
    expected = stats.trim_mean(rows(received), share + 1e-9, axis=0)
    found = combine(received, aggregation="trimmed-mean")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_the_median_is_numpys(count: int) -> None:
    received = made(count)
    found = combine(received, aggregation="median")
    np.testing.assert_allclose(found.numpy(), np.median(rows(received), axis=0), rtol=1e-6)


def test_centred_clip_is_its_formula() -> None:
    received = made(5)
    vectors, shares = rows(received), np.array([each.weight for each in received])
    shares /= shares.sum()
    centre = np.zeros(vectors.shape[1])
    for _ in range(3):
        apart = vectors - centre
        distances = np.linalg.norm(apart, axis=1)
        scale = np.minimum(1, np.median(distances) / distances)
        centre = centre + (shares[:, None] * scale[:, None] * apart).sum(0)
    found = combine(received, aggregation="centred-clip")
    np.testing.assert_allclose(found.numpy(), centre, rtol=1e-5, atol=1e-5)


def test_radial_keeps_the_length_of_contributions_that_point_apart() -> None:
    received = made(4, spread=5.0)
    vectors, shares = rows(received), np.array([each.weight for each in received])
    shares /= shares.sum()
    lengths = np.linalg.norm(vectors, axis=1)
    direction = (shares[:, None] * vectors / lengths[:, None]).sum(0)
    expected = (shares * lengths).sum() * direction / np.linalg.norm(direction)
    found = combine(received, average="radial")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert norm(found) > 1.5 * norm(combine(received))


@pytest.mark.parametrize("average", ["plain", "radial"])
@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_changes_no_bit(rule: str, average: str) -> None:
    received = made(6)
    found = combine(received, average, rule)
    assert torch.equal(combine(received[::-1], average, rule), found)
    assert torch.equal(combine([received[3], *received[:3], *received[4:]], average, rule), found)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
@pytest.mark.parametrize("scale", [1e3, 1e12, -1e3])
def test_one_liar_of_four_moves_robust_rules_no_farther_than_an_honest_peer_could(
    rule: str, scale: float
) -> None:
    received = made(4)
    honest = combine(received[:3])
    liar = Received("p3", scale * received[3].values, 100.0)
    widest = max(norm(each.values - honest) for each in received)
    assert norm(combine([*received[:3], liar], aggregation=rule) - honest) < widest
    assert norm(combine([*received[:3], liar]) - honest) > 10 * widest


def test_clipping_to_the_median() -> None:
    received = [
        Received(f"p{i}", torch.ones(4) * scale, 1.0) for i, scale in enumerate((1, 3, 5, 900))
    ]
    clipped = [norm(each.values) for each in clip_to_median(received)]
    assert clipped == pytest.approx([2, 6, 8, 8])
    barred = [*received[:3], Received("p3", received[3].values, 0.0)]
    assert [norm(each.values) for each in clip_to_median(barred)][:3] == pytest.approx([2, 6, 6])


def test_what_has_no_weight_counts_nowhere() -> None:
    received = made(5)
    for rule in RULES:
        barred = [*received[:4], Received("p4", received[4].values * 1e6, 0.0)]
        assert torch.equal(
            combine(barred, aggregation=rule), combine(received[:4], aggregation=rule)
        )
    nobody = [Received("p0", torch.ones(3), 0.0)]
    assert torch.equal(combine(nobody), torch.zeros(3))


def test_zeros_have_no_sign() -> None:
    # -0 and 0 are equal, and a hash of them is not: no rule may let it through.
    values = [torch.tensor([sign * 0.0, -0.0, 1.0]) for sign in (-1.0, -1.0, 1.0)]
    received = [Received(f"p{index}", each, 1.0) for index, each in enumerate(values)]
    for rule in RULES:
        assert not combine(received, aggregation=rule)[:2].signbit().any(), rule


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        combine([])
    with pytest.raises(ValueError, match="one length"):
        combine([Received("a", torch.zeros(2), 1.0), Received("b", torch.zeros(3), 1.0)])
    with pytest.raises(ValueError, match="no aggregation"):
        combine(made(2), aggregation="krum")
    with pytest.raises(ValueError, match="no average"):
        combine(made(2), average="sum")
