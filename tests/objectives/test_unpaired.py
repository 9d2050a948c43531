"""KTO against its formula in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.objectives.unpaired import (
    kl_baseline,
    kl_sum,
    unpaired_figures,
    unpaired_losses,
)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def answers():
    generator = torch.Generator().manual_seed(6)
    policy, reference = -5.0 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    return policy, reference, torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)


def test_losses_are_the_formula():
    policy, reference, desirable = answers()
    got = unpaired_losses(
        policy, reference, desirable, 0.7, beta=0.4, desirable_weight=1.5, undesirable_weight=0.6
    )
    wanted = [
        1.5 * (1 - sigmoid(0.4 * (p - r - 0.7)))
        if good
        else 0.6 * (1 - sigmoid(0.4 * (0.7 - p + r)))
        for p, r, good in zip(policy.tolist(), reference.tolist(), desirable.tolist(), strict=True)
    ]
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)


def test_apo_zero_has_no_point_of_comparison():
    policy, reference, desirable = answers()
    got = unpaired_losses(policy, reference, desirable, 0.7, loss="apo_zero", beta=0.4)
    wanted = unpaired_losses(policy, reference, desirable, 0.0, beta=0.4)
    assert torch.equal(got, wanted)


def test_gradients_are_those_of_finite_differences():
    policy, reference, desirable = answers()

    def losses(policy):
        return unpaired_losses(policy, reference, desirable, 0.3, undesirable_weight=2.0)

    assert torch.autograd.gradcheck(losses, policy.requires_grad_())


def test_the_baseline_is_the_mean_over_the_whole_batch_and_never_negative():
    policy = torch.tensor([3.0, 1.0, -5.0, 0.0], requires_grad=True)
    reference = torch.tensor([1.0, 2.0, -7.0, 0.0])
    counts = torch.tensor([4.0, 2.0, 1.0, 0.0])  # the last is no answer
    total, number = kl_sum(policy, reference, counts)
    assert (total.item(), number.item()) == (3.0, 3.0)
    other, more = kl_sum(reference[:1], policy[:1], counts[:1])  # another worker's part
    assert kl_baseline(total + other, number + more).item() == pytest.approx(0.25)
    assert kl_baseline(other, more).item() == 0.0
    assert not kl_baseline(total, number).requires_grad
    assert kl_baseline(torch.zeros(()), torch.zeros(())).item() == 0.0


def test_figures_are_sums_of_each_kind():
    policy = torch.tensor([-1.0, -2.0, -4.0, 0.0])
    reference = torch.tensor([-2.0, -2.5, -3.0, 0.0])
    desirable = torch.tensor([True, False, True, True])
    counts = torch.tensor([3.0, 3.0, 3.0, 0.0])
    figures = unpaired_figures(policy, reference, desirable, counts, 0.5)
    assert {name: value.item() for name, value in figures.items()} == {
        "rewards/chosen": 0.0,
        "logps/chosen": -5.0,
        "chosen": 2.0,
        "rewards/rejected": 0.25,
        "logps/rejected": -2.0,
        "rejected": 1.0,
    }
