"""Losses over single answers marked good or bad: KTO and APO-zero.

KTO measures an answer's reward from a point that both kinds share: how far the policy has moved
from the reference on answers that do not belong to their prompts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

UnpairedLoss = Literal["kto", "apo_zero"]


def kl_sum(policy: Tensor, reference: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (log π − log π_ref) over answers that do not belong to their prompts, and their number.

    policy and reference [answers] are sums over tokens, counts [answers] the numbers of those; an
    answer without tokens is none. Both results are scalars to be summed over the whole batch.
    """
    real = counts > 0
    ratios = (policy - reference).detach().where(real, 0.0)
    return ratios.sum(), real.sum().to(ratios.dtype)


def kl_baseline(total: Tensor, number: Tensor) -> Tensor:
    """KTO's point of comparison: the batch's mean of `kl_sum`, at least 0, without a gradient."""
    return (total / number.clamp(min=1.0)).clamp(min=0.0).detach()


def unpaired_losses(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    loss: UnpairedLoss = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Weighted losses of answers, [answers].

    policy and reference are log-probabilities, summed over an answer's tokens, desirable is bool,
    all [answers]; kl is a scalar. With Δ = log π − log π_ref, a good answer's loss is
    1 − σ(β(Δ − kl)), a bad one's 1 − σ(β(kl − Δ)): Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7.
    `apo_zero` is the same with kl = 0 (D'Oosterlinck et al. 2024, arXiv:2408.06266). The batch's
    loss is the sum over all answers, divided by their number whatever the weights.
    """
    ratio = policy - reference
    moved = beta * (ratio if loss == "apo_zero" else ratio - kl)
    # 1 − σ(x) = σ(−x), which keeps its digits where σ(x) is near 1.
    good = desirable_weight * torch.sigmoid(-moved)
    bad = undesirable_weight * torch.sigmoid(moved)
    return good.where(desirable, bad)


def unpaired_figures(
    policy: Tensor, reference: Tensor, desirable: Tensor, counts: Tensor, beta: float
) -> dict[str, Tensor]:
    """What is logged of answers, as sums; divide by "chosen" and "rejected", the numbers of each.

    counts [answers] are numbers of tokens; an answer without any is none.
    """
    answer_rewards = (beta * (policy - reference)).detach()
    figures = {}
    for name, which in (("chosen", desirable), ("rejected", ~desirable)):
        which = which & (counts > 0)
        figures[f"rewards/{name}"] = answer_rewards.where(which, 0.0).sum()
        figures[f"logps/{name}"] = policy.detach().where(which, 0.0).sum()
        figures[name] = which.sum().to(policy.dtype)
    return figures
