"""Preference losses against their formulas in plain numbers, and against published values."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.objectives.log_probs import PairScores
from trainwright.objectives.preference import (
    LOSSES,
    PreferenceOptions,
    implicit_rewards,
    preference_figures,
    preference_losses,
)
from trainwright.recipe.objective import APART, SMOOTHED

BETA, EPSILON, TAU = 0.3, 0.2, 0.05


def scores(pairs: int = 5, dtype=torch.float64) -> PairScores:
    generator = torch.Generator().manual_seed(11)
    sums = -6.0 * torch.rand(4, pairs, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 9, (2, pairs), generator=generator).to(dtype)
    return PairScores(*sums, *tokens)


def log_sigmoid(x: float) -> float:
    return -math.log(1.0 + math.exp(-x))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def smoothed(x: float) -> float:
    return -(1 - EPSILON) * log_sigmoid(x) - EPSILON * log_sigmoid(-x)


def exo(x: float) -> float:
    q = sigmoid(x)
    return q * math.log(q / (1 - EPSILON)) + (1 - q) * math.log((1 - q) / EPSILON)


# Each as a function of c = Δc, r = Δr and the numbers of tokens m and n.
FORMULAS = {
    "sigmoid": lambda c, r, m, n: -log_sigmoid(BETA * (c - r)),
    "cdpo": lambda c, r, m, n: smoothed(BETA * (c - r)),
    "robust": lambda c, r, m, n: (
        (-(1 - EPSILON) * log_sigmoid(BETA * (c - r)) + EPSILON * log_sigmoid(-BETA * (c - r)))
        / (1 - 2 * EPSILON)
    ),
    "hinge": lambda c, r, m, n: max(0.0, 1 - BETA * (c - r)),
    "ipo": lambda c, r, m, n: (c / m - r / n - 1 / (2 * BETA)) ** 2,
    "exo": lambda c, r, m, n: exo(BETA * (c - r)),
    "nca": lambda c, r, m, n: (
        -log_sigmoid(BETA * c) - log_sigmoid(-BETA * c) / 2 - log_sigmoid(-BETA * r) / 2
    ),
    "bco": lambda c, r, m, n: -log_sigmoid(BETA * c) - log_sigmoid(-BETA * r),
    "sppo": lambda c, r, m, n: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r, m, n: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda c, r, m, n: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
    "discopop": lambda c, r, m, n: (
        -log_sigmoid(BETA * (c - r)) * (1 - sigmoid(BETA * (c - r) / TAU))
        + math.exp(-BETA * (c - r)) * sigmoid(BETA * (c - r) / TAU)
    ),
    "sigmoid_norm": lambda c, r, m, n: -log_sigmoid(BETA * (c / m - r / n)),
}


def options_for(name: str) -> PreferenceOptions:
    smoothing = EPSILON if name in SMOOTHED else 0.0
    return PreferenceOptions(beta=BETA, label_smoothing=smoothing)


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_is_its_formula(name):
    pairs = scores()
    got = LOSSES[name](pairs, options_for(name))
    numbers = zip(*(each.tolist() for each in pairs), strict=True)
    wanted = [FORMULAS[name](pc - rc, pr - rr, m, n) for pc, pr, rc, rr, m, n in numbers]
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)


def test_sorted_losses_meet_in_order_of_size():
    pairs = scores()
    pc, pr, rc, rr = (each.tolist() for each in pairs[:4])

    def sorted_against(upper, lower):
        ranks = sorted(range(len(upper)), key=upper.__getitem__)
        wanted = [0.0] * len(upper)
        for rank, low in zip(ranks, sorted(lower), strict=True):
            wanted[rank] = smoothed(BETA * (upper[rank] - low))
        return pytest.approx(wanted, rel=1e-12)

    def minus(a, b):
        return [x - y for x, y in zip(a, b, strict=True)]

    assert LOSSES["aot"](pairs, options_for("aot")).tolist() == sorted_against(
        minus(pc, pr), minus(rc, rr)
    )
    assert LOSSES["aot_unpaired"](pairs, options_for("aot_unpaired")).tolist() == sorted_against(
        minus(pc, rc), minus(pr, rr)
    )


def test_every_loss_is_checked_here():
    assert set(LOSSES) == {*FORMULAS, "aot", "aot_unpaired"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_before_the_first_step_the_sigmoid_loss_is_ln_2(dtype):
    pairs = scores(dtype=dtype)
    same = pairs._replace(
        reference_chosen=pairs.policy_chosen, reference_rejected=pairs.policy_rejected
    )
    losses = LOSSES["sigmoid"](same, PreferenceOptions())
    assert losses.tolist() == pytest.approx([math.log(2)] * 5, abs=1e-7)


def test_values_that_torchtune_publishes():
    # torchtune, tests/torchtune/rlhf/loss/test_dpo_loss.py: DPO with beta 0.1
    one = torch.ones(3)
    pairs = PairScores(
        torch.tensor([-0.5, -10.0, -1.0]),
        torch.tensor([-0.1, -30.0, -21.0]),
        torch.tensor([-0.5, -10.1, -0.1]),
        torch.tensor([-0.1, -20.1, -0.1]),
        one,
        one,
    )
    losses = LOSSES["sigmoid"](pairs, PreferenceOptions(beta=0.1))
    assert losses.tolist() == pytest.approx([math.log(2), 0.313262, 0.126928], abs=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name, divergence):
    if divergence != "reverse_kl" and name in APART:
        return
    smoothing = options_for(name).label_smoothing
    options = PreferenceOptions(BETA, smoothing, 0.5, divergence, divergence_alpha=0.3)
    pairs = scores()
    policy = [each.requires_grad_() for each in pairs[:2]]

    def losses(chosen, rejected):
        given = pairs._replace(policy_chosen=chosen, policy_rejected=rejected)
        return LOSSES[name](given, options)

    assert torch.autograd.gradcheck(losses, policy)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_a_divergence_maps_the_ratio_by_its_derivative(divergence):
    pairs = scores()
    options = PreferenceOptions(beta=BETA, divergence=divergence, divergence_alpha=0.3)
    got = LOSSES["sigmoid"](pairs, options)

    def derivative(log_ratio):  # f′(u), up to a constant that cancels between the answers
        u = math.exp(log_ratio)
        return {
            "forward_kl": -1 / u,
            "js": math.log(u / (1 + u)),
            "alpha": u**-0.7 / -0.7,
        }[divergence]

    ratios = zip(pairs.chosen_ratio.tolist(), pairs.rejected_ratio.tolist(), strict=True)
    wanted = [-log_sigmoid(BETA * (derivative(c) - derivative(r))) for c, r in ratios]
    assert got.tolist() == pytest.approx(wanted, rel=1e-10)


def test_an_alpha_divergence_of_order_1_is_reverse_kl():
    pairs = scores()
    wanted = LOSSES["sigmoid"](pairs, PreferenceOptions())
    for alpha in (1.0, 1.0 + 1e-5):
        options = PreferenceOptions(divergence="alpha", divergence_alpha=alpha)
        torch.testing.assert_close(LOSSES["sigmoid"](pairs, options), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_places_without_a_pair_change_nothing(name):
    pairs = scores()
    options = options_for(name)
    wanted = preference_losses({name: 1.0}, pairs, options)
    padded = PairScores(*(torch.cat([each[:2], each.new_zeros(3), each[2:]]) for each in pairs))
    chosen = padded.policy_chosen.requires_grad_()
    got = preference_losses({name: 1.0}, padded, options)
    torch.testing.assert_close(got[[0, 1, 5, 6, 7]], wanted)
    assert got[2:5].tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(got.sum(), chosen)
    assert bool(gradient.isfinite().all())
    assert gradient[2:5].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [-3e4, 3e4])
def test_far_from_the_reference_losses_and_gradients_are_numbers(name, size):
    zero = torch.zeros(2)
    chosen = torch.tensor([size, size / 2]).requires_grad_()
    pairs = PairScores(chosen, -chosen.detach(), zero, zero, zero + 7, zero + 7)
    loss = LOSSES[name](pairs, options_for(name)).sum()
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_weights_add_losses_up():
    pairs = scores()
    options = PreferenceOptions(beta=BETA, label_smoothing=EPSILON)
    got = preference_losses({"sigmoid": 1.0, "robust": 0.25}, pairs, options)
    wanted = LOSSES["sigmoid"](pairs, options) + LOSSES["robust"](pairs, options) / 4
    torch.testing.assert_close(got, wanted)


def test_figures_are_sums_over_real_pairs():
    zero, one = torch.zeros(4), torch.ones(4)
    # a win, a loss, a tie (which is no win), and no pair at all
    pairs = PairScores(
        torch.tensor([-1.0, -5.0, -2.0, 0.0]),
        torch.tensor([-3.0, -4.0, -2.0, 0.0]),
        zero,
        zero,
        torch.tensor([2.0, 2.0, 2.0, 0.0]),
        one,
    )
    figures = preference_figures(pairs, *implicit_rewards(pairs, 0.5))
    assert {name: value.item() for name, value in figures.items()} == {
        "rewards/chosen": -4.0,
        "rewards/rejected": -4.5,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.5,
        "logps/chosen": -8.0,
        "logps/rejected": -9.0,
        "pairs": 3.0,
    }
