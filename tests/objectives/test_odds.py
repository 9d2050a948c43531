"""ORPO, CPO and SimPO against their formulas in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.objectives.log_probs import PairScores
from trainwright.objectives.odds import contrastive_losses, odds_ratio, orpo_losses

BETA, GAMMA, EPSILON = 0.6, 0.4, 0.1


def scores() -> PairScores:
    generator = torch.Generator().manual_seed(8)
    sums = -9.0 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 9, (2, 6), generator=generator).double()
    zero = torch.zeros(6, dtype=torch.float64)
    return PairScores(*sums, zero, zero, *tokens)


def answers(pairs: PairScores):
    parts = (pairs.policy_chosen, pairs.policy_rejected, pairs.chosen_tokens, pairs.rejected_tokens)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def log_sigmoid(x: float) -> float:
    return -math.log(1.0 + math.exp(-x))


def smoothed(x: float) -> float:
    return -(1 - EPSILON) * log_sigmoid(x) - EPSILON * log_sigmoid(-x)


FORMULAS = {
    "sigmoid": lambda c, r, m, n: smoothed(BETA * (c - r)),
    "hinge": lambda c, r, m, n: max(0.0, 1 - BETA * (c - r)),
    "ipo": lambda c, r, m, n: (c / m - r / n - 1 / (2 * BETA)) ** 2,
    "simpo": lambda c, r, m, n: smoothed(BETA * (c / m - r / n) - GAMMA),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_contrastive_losses_are_their_formulas(loss):
    got = contrastive_losses(scores(), loss=loss, beta=BETA, gamma=GAMMA, label_smoothing=EPSILON)
    wanted = [FORMULAS[loss](*pair) for pair in answers(scores())]
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)


def test_odds_are_those_of_the_geometric_mean_of_probabilities():
    def odds(log_prob, tokens):
        p = math.exp(log_prob / tokens)
        return p / (1 - p)

    ratios = [odds(c, m) / odds(r, n) for c, r, m, n in answers(scores())]
    wanted = [math.log(ratio) for ratio in ratios]
    assert odds_ratio(scores()).tolist() == pytest.approx(wanted, rel=1e-10)
    wanted = [BETA * math.log(1 + 1 / ratio) for ratio in ratios]
    assert orpo_losses(scores(), beta=BETA).tolist() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("loss", ["orpo", *FORMULAS])
def test_gradients_are_those_of_finite_differences(loss):
    pairs = scores()

    def losses(chosen, rejected):
        given = pairs._replace(policy_chosen=chosen, policy_rejected=rejected)
        if loss == "orpo":
            return orpo_losses(given)
        return contrastive_losses(given, loss=loss, label_smoothing=EPSILON)

    policy = [each.requires_grad_() for each in pairs[:2]]
    assert torch.autograd.gradcheck(losses, policy)


@pytest.mark.parametrize("log_prob", [0.0, -1e-30, -1e-6, -math.log(2), -50.0, -1e4])
def test_odds_of_certain_and_of_impossible_answers_have_finite_losses(log_prob):
    chosen = torch.tensor([log_prob, -1.0]).requires_grad_()
    rejected = torch.tensor([-1.0, log_prob]).requires_grad_()
    one, zero = torch.ones(2), torch.zeros(2)
    loss = orpo_losses(PairScores(chosen, rejected, zero, zero, one, one)).sum()
    gradients = torch.autograd.grad(loss, [chosen, rejected])
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_places_without_a_pair_have_finite_gradients():
    zero = torch.zeros(3)
    chosen = torch.zeros(3, requires_grad=True)
    empty = PairScores(chosen, zero, zero, zero, zero, zero)
    for loss in (orpo_losses(empty), *(contrastive_losses(empty, loss=name) for name in FORMULAS)):
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
