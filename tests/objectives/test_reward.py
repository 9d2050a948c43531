"""The reward model's loss against its formula in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.objectives.reward import reward_figures, reward_losses


def rewards():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(2, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_losses_are_the_formula(center):
    chosen, rejected = rewards()
    margins = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    got = reward_losses(chosen, rejected, margins, center=center)
    triples = zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)
    wanted = [math.log(1 + math.exp(-(c - r - m))) + center * (c + r) ** 2 for c, r, m in triples]
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)


def test_gradients_are_those_of_finite_differences():
    chosen, rejected = (each.clone().requires_grad_() for each in rewards())

    def losses(chosen, rejected):
        return reward_losses(chosen, rejected, 0.5, center=0.1)

    assert torch.autograd.gradcheck(losses, (chosen, rejected))


def test_equal_scores_cost_ln_2():
    chosen, _ = rewards()
    assert reward_losses(chosen, chosen).tolist() == pytest.approx([math.log(2)] * 5)


def test_figures_are_sums_over_real_pairs():
    chosen = torch.tensor([2.0, 1.0, 3.0, 9.0])
    rejected = torch.tensor([1.0, 1.0, 4.0, 0.0])  # a win, a tie, a loss, and no pair
    real = torch.tensor([True, True, True, False])
    figures = reward_figures(chosen, rejected, real)
    assert {name: value.item() for name, value in figures.items()} == {
        "rewards/chosen": 6.0,
        "rewards/rejected": 6.0,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.0,
        "pairs": 3.0,
    }
