"""Losses over pairs that need no reference model: ORPO, CPO and SimPO.

Each is one part of an objective whose other part is the cross entropy of the chosen answer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.objectives.log_probs import PairScores

ContrastiveLoss = Literal["sigmoid", "hinge", "ipo", "simpo"]
BY_TOKENS: tuple[ContrastiveLoss, ...] = ("ipo", "simpo")


def mean_log_probs(scores: PairScores) -> tuple[Tensor, Tensor]:
    """log π a token of the chosen and of the rejected answers, both [pairs]."""
    return (
        scores.policy_chosen / scores.chosen_tokens.clamp(min=1.0),
        scores.policy_rejected / scores.rejected_tokens.clamp(min=1.0),
    )


def odds_ratio(scores: PairScores) -> Tensor:
    """log [odds(chosen) / odds(rejected)] with odds = p / (1 − p), [pairs].

    p is the geometric mean of an answer's token probabilities. Hong et al. 2024, arXiv:2403.07691,
    eq. 4.
    """
    chosen, rejected = (_below_zero(mean) for mean in mean_log_probs(scores))
    return (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))


def orpo_losses(scores: PairScores, *, beta: float = 0.1) -> Tensor:
    """−β·log σ(log odds ratio), [pairs]; to it comes the cross entropy. Same paper, eq. 6 and 7."""
    return -beta * F.logsigmoid(odds_ratio(scores))


def contrastive_losses(
    scores: PairScores,
    *,
    loss: ContrastiveLoss = "sigmoid",
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CPO's preference term, or SimPO's, [pairs].

    With δ = log π(chosen) − log π(rejected), of sums over tokens for `sigmoid` and `hinge` and of
    means for `ipo` and `simpo`: `sigmoid` is −(1 − ε)·log σ(βδ) − ε·log σ(−βδ) (Xu et al. 2024,
    arXiv:2401.08417, eq. 3), `simpo` the same of βδ − γ (Meng et al. 2024, arXiv:2405.14734),
    `hinge` max(0, 1 − βδ) and `ipo` (δ − 1/(2β))². ε is `label_smoothing`, which `hinge` and `ipo`
    do not have.
    """
    if loss in BY_TOKENS:
        chosen, rejected = mean_log_probs(scores)
    else:
        chosen, rejected = scores.policy_chosen, scores.policy_rejected
    difference = chosen - rejected
    if loss == "ipo":
        return (difference - 1.0 / (2.0 * beta)) ** 2
    logit = beta * difference
    if loss == "hinge":
        return torch.relu(1.0 - logit)
    if loss == "simpo":
        logit = logit - gamma
    smoothing = label_smoothing
    return -(1.0 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)


def _below_zero(log_prob: Tensor) -> Tensor:
    """Probabilities a little below 1 at most: odds are infinite at 1."""
    return log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact near 0 and far from it (Mächler 2012).

    Each branch gets an argument from its own side: a branch not taken must not turn the gradient
    into nan.
    """
    border = -math.log(2.0)
    near = torch.log(-torch.expm1(x.clamp(min=border)))
    far = torch.log1p(-torch.exp(x.clamp(max=border)))
    return near.where(x > border, far)
