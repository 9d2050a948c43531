"""What contributions give away: planted conduct is found, honest conduct is not taken for it."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainwright.swarm.conduct import (
    Finding,
    _agreement,
    examine,
    sketches_of,
)
from trainwright.swarm.methods.method import Received

SIZE = 20_000


class Round:
    """Contributions with a common direction and noise: correlation 1 / (1 + spread²) of any two."""

    def __init__(self, peers: int = 4, spread: float = 1.5, seed: int = 0) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        # Some places matter far more than others, as in real networks.
        self.scale = self.noise().div(2).exp()
        common = self.noise() * self.scale
        self.values = {
            f"p{index}": common + spread * self.noise() * self.scale for index in range(peers)
        }

    def noise(self) -> Tensor:
        return torch.randn(SIZE, generator=self.draws)

    def received(self, **changed: Tensor) -> list[Received]:
        values = {**self.values, **changed}
        return [Received(peer, each, 100.0) for peer, each in values.items()]

    def found(
        self, earlier: list[list[Received]] | None = None, **changed: Tensor
    ) -> list[Finding]:
        received = self.received(**changed)
        past = {index: sketches_of(each) for index, each in enumerate(earlier or [])}
        return examine(received, sketches_of(received), past)


def told(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(each.peer, each.kind) for each in findings]


@pytest.mark.parametrize("peers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("spread", [0.05, 1.5, 8.0, 1000.0])
def test_nothing_is_found_of_honest_contributions(peers: int, spread: float) -> None:
    rounds = [Round(peers, spread, seed) for seed in range(3)]
    earlier = [each.received() for each in rounds[1:]]
    assert rounds[0].found(earlier) == []


@pytest.mark.parametrize("peers", [3, 4, 8])
def test_lengths(peers: int) -> None:
    made = Round(peers)
    assert told(made.found(p1=torch.zeros(SIZE))) == [("p1", "zero")]
    assert told(made.found(p1=made.values["p1"] * 1000)) == [("p1", "too large")]
    assert made.found(p1=made.values["p1"] * 20) == []
    assert made.found(p1=made.values["p1"] / 500) == []  # one step instead of 500


def test_nobody_is_accused_where_all_are_zero() -> None:
    zeros = {f"p{index}": torch.zeros(SIZE) for index in range(4)}
    assert Round().found(**zeros) == []


@pytest.mark.parametrize("peers", [3, 4, 8])
def test_reversed_and_random(peers: int) -> None:
    made = Round(peers)
    assert told(made.found(p2=-made.values["p2"])) == [("p2", "reversed")]
    assert told(made.found(p2=made.noise())) == [("p2", "random")]
    # The magnitudes of an honest contribution with random signs, and of values at random places.
    signed = made.values["p2"].abs() * made.noise().sign()
    assert told(made.found(p2=signed)) == [("p2", "random")]
    places = torch.randperm(SIZE, generator=made.draws)
    assert told(made.found(p2=made.values["p2"][places])) == [("p2", "random")]


def test_two_liars_of_six() -> None:
    made = Round(6)
    found = told(made.found(p1=-made.values["p1"], p4=made.noise()))
    assert sorted(found) == [("p1", "reversed"), ("p4", "random")]


def test_sparse_contributions() -> None:
    made = Round(4)
    sparse = {peer: top(values, 1000) for peer, values in made.values.items()}
    assert made.found(**sparse) == []
    assert told(made.found(**sparse | {"p3": -sparse["p3"]})) == [("p3", "reversed")]
    assert told(made.found(**sparse | {"p3": top(made.noise(), 1000)})) == [("p3", "random")]
    assert told(made.found(**sparse | {"p3": sparse["p0"]})) == [("p0", "copy"), ("p3", "copy")]


def top(values: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(values)
    places = values.abs().topk(count).indices
    kept[places] = values[places]
    return kept


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.03])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_copies(noise: float, scale: float) -> None:
    made = Round(4)
    victim = made.values["p0"]
    copy = scale * (victim + noise * made.noise() * victim.norm() / math.sqrt(SIZE))
    found = made.found(p2=copy)
    assert [(each.peer, each.kind, each.twin) for each in found] == [
        ("p0", "copy", "p2"),
        ("p2", "copy", "p0"),
    ]
    assert found[0].exact == (noise == 0 and scale == 1)


def test_two_peers_can_only_be_held_against_each_other_bit_for_bit() -> None:
    made = Round(2)
    assert made.found(p1=made.values["p0"] * 1.001) == []
    assert told(made.found(p1=made.values["p0"].clone())) == [("p0", "copy"), ("p1", "copy")]


def test_two_with_the_same_data_are_no_copies() -> None:
    made = Round(4)
    own = made.noise() * made.scale * 2
    like = {
        peer: made.values["p0"] + own + 0.3 * made.noise() * made.scale for peer in ("p0", "p1")
    }
    assert made.found(**like) == []


def test_stale_contributions_name_what_they_repeat() -> None:
    made, earlier = Round(4, seed=1), [Round(4, seed=2).received(), Round(4, seed=3).received()]
    own, other = earlier[0][3].values, earlier[1][0].values
    (found,) = made.found(earlier, p3=own.clone())
    assert (found.peer, found.kind, found.twin, found.of, found.exact) == (
        "p3",
        "stale",
        "p3",
        0,
        True,
    )
    (found,) = made.found(earlier, p3=other.clone())
    assert (found.peer, found.twin, found.of, found.exact) == ("p3", "p0", 1, True)
    (found,) = made.found(earlier, p3=other + 0.02 * made.noise() * other.abs().mean())
    assert (found.peer, found.twin, found.of, found.exact) == ("p3", "p0", 1, False)


def test_peers_that_hardly_change_their_direction_are_not_stale() -> None:
    # Whole-batch gradients: each peer's own is the same from round to round but for 1 %.
    made = Round(4)
    earlier = [
        [
            Received(peer, each + 0.01 * made.noise() * made.scale, 1.0)
            for peer, each in made.values.items()
        ]
        for _ in range(3)
    ]
    assert made.found(earlier) == []


def test_chance_has_the_threshold_that_it_should_have() -> None:
    """z of random signs is a standard normal, whatever the magnitudes: heavy tails, sparse."""
    made = Round(3)
    values = {"a": top(made.values["p0"].pow(3), 5000), "b": made.values["p1"].pow(3)}
    zs = []
    for _ in range(100):
        mine = made.values["p2"].abs() * made.noise().sign()
        vectors = {**values, "liar": mine}
        lengths = {peer: float(each.norm()) for peer, each in vectors.items()}
        zs.append(_agreement(vectors, lengths)["liar"][0])
    assert abs(np.mean(zs)) < 0.4
    assert 0.75 < np.std(zs) < 1.25
    assert max(map(abs, zs)) < 4.5


def test_the_agreement_is_its_formula() -> None:
    made = Round(3)
    vectors = {peer: each.double().numpy() for peer, each in made.values.items()}
    lengths = {peer: float(np.linalg.norm(each)) for peer, each in vectors.items()}
    for peer, (z, correlation) in _agreement(made.values, lengths).items():
        others = sum(each / lengths[other] for other, each in vectors.items() if other != peer)
        product = vectors[peer] * others
        assert z == pytest.approx(product.sum() / np.sqrt((product**2).sum()), rel=1e-4)
        cosine = product.sum() / lengths[peer] / np.linalg.norm(others)
        assert correlation == pytest.approx(cosine, rel=1e-4)


def test_sketches_keep_angles() -> None:
    made = Round(5, spread=0.7)
    sketches = sketches_of(made.received())
    for one, other in combinations(made.values, 2):
        cosine = float(torch.cosine_similarity(made.values[one], made.values[other], dim=0))
        found = sum(a * b for a, b in zip(sketches[one], sketches[other], strict=True))
        assert found == pytest.approx(cosine, abs=0.35)
    assert sketches_of([Received("a", torch.zeros(SIZE), 1.0)]) == {}
