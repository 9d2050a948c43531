"""Losses over pairs of a better and a worse answer, against a reference model: DPO and its kin.

All are functions of the pairs' log-probabilities and return a loss for each pair. Throughout, Δc
and Δr are log π − log π_ref of the chosen and the rejected answer, and δ their difference after
the f-divergence's map; β is how dearly leaving the reference is paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.objectives.log_probs import PairScores

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

LARGEST_EXPONENT = 80.0  # exp of more is near the end of fp32


@dataclass(frozen=True)
class PreferenceOptions:
    """What the losses read beside the pairs."""

    beta: float = 0.1
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round
    discopop_temperature: float = 0.05
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5  # the order of the alpha divergence


# Losses [pairs] with gradients for the policy's log-probabilities.
PreferenceLoss = Callable[[PairScores, PreferenceOptions], Tensor]


def divergence_map(log_ratio: Tensor, options: PreferenceOptions) -> Tensor:
    """f′(u) of u = π/π_ref for the f-divergence that keeps the policy near the reference.

    log_ratio is log u. Reverse KL: log u; forward KL: 1 − 1/u; Jensen-Shannon: log(2u / (1 + u));
    alpha: (u^(α − 1) − 1) / (α − 1). Wang et al. 2024, arXiv:2309.16240.
    """
    if options.divergence == "forward_kl":
        return 1.0 - torch.exp(-log_ratio)
    if options.divergence == "js":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    if options.divergence == "alpha":
        order = options.divergence_alpha - 1.0
        if abs(order) < 1e-6:  # the limit, which is reverse KL
            return log_ratio
        return torch.expm1((order * log_ratio).clamp(max=LARGEST_EXPONENT)) / order
    return log_ratio


def _mapped(scores: PairScores, options: PreferenceOptions) -> tuple[Tensor, Tensor]:
    return (
        divergence_map(scores.chosen_ratio, options),
        divergence_map(scores.rejected_ratio, options),
    )


def _logit(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """βδ."""
    chosen, rejected = _mapped(scores, options)
    return options.beta * (chosen - rejected)


def _mean_difference(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Δc a token of the chosen answer, less Δr a token of the rejected one."""
    chosen, rejected = _mapped(scores, options)
    chosen_tokens, rejected_tokens = (
        tokens.clamp(min=1.0) for tokens in (scores.chosen_tokens, scores.rejected_tokens)
    )
    return chosen / chosen_tokens - rejected / rejected_tokens


def _smoothed(logit: Tensor, smoothing: float) -> Tensor:
    """The logistic loss where a share `smoothing` of the pairs is the wrong way round."""
    return -(1.0 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)


def sigmoid(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """−log σ(βδ). Rafailov et al. 2023, arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(_logit(scores, options))


def cdpo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """−(1 − ε)·log σ(βδ) − ε·log σ(−βδ): conservative DPO. Mitchell 2023, ericmitchell.ai/cdpo."""
    return _smoothed(_logit(scores, options), options.label_smoothing)


def robust(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """[−(1 − ε)·log σ(βδ) + ε·log σ(−βδ)] / (1 − 2ε), ε < ½: unbiased where a share ε of the pairs
    is flipped. Chowdhury et al. 2024, arXiv:2403.00409.
    """
    logit, smoothing = _logit(scores, options), options.label_smoothing
    loss = -(1.0 - smoothing) * F.logsigmoid(logit) + smoothing * F.logsigmoid(-logit)
    return loss / (1.0 - 2.0 * smoothing)


def hinge(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """max(0, 1 − βδ). SLiC, Zhao et al. 2023, arXiv:2305.10425; RSO, arXiv:2309.06657."""
    return torch.relu(1.0 - _logit(scores, options))


def ipo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """(Δc / |chosen| − Δr / |rejected| − 1/(2β))², by tokens. Azar et al. 2023, arXiv:2310.12036,
    eq. 17, with the mean over tokens that its authors use.
    """
    return (_mean_difference(scores, options) - 1.0 / (2.0 * options.beta)) ** 2


def exo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """KL((q, 1 − q) ‖ (1 − ε, ε)) with q = σ(βδ), ε > 0. Ji et al. 2024, arXiv:2402.00856, eq. 16
    for two answers.
    """
    logit, smoothing = _logit(scores, options), options.label_smoothing
    chosen, rejected = F.logsigmoid(logit), F.logsigmoid(-logit)
    return chosen.exp() * (chosen - math.log1p(-smoothing)) + rejected.exp() * (
        rejected - math.log(smoothing)
    )


def nca(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """−log σ(βΔc) − ½·log σ(−βΔc) − ½·log σ(−βΔr). Chen et al. 2024, arXiv:2402.05369, for two
    answers.
    """
    chosen, rejected = options.beta * scores.chosen_ratio, options.beta * scores.rejected_ratio
    down = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * down


def bco(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """−log σ(βΔc) − log σ(−βΔr): binary classifier optimisation without its reward shift. Jung et
    al. 2024, arXiv:2404.04656.
    """
    chosen, rejected = options.beta * scores.chosen_ratio, options.beta * scores.rejected_ratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """(Δc − 1/(2β))² + (Δr + 1/(2β))²: the chosen answer wins with certainty. Wu et al. 2024,
    arXiv:2405.00675, eq. 4.7.
    """
    target = 0.5 / options.beta
    return (scores.chosen_ratio - target) ** 2 + (scores.rejected_ratio + target) ** 2


def apo_zero(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """1 − σ(βΔc) + σ(βΔr), for chosen answers that are better than the model's own. D'Oosterlinck
    et al. 2024, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = options.beta * scores.chosen_ratio, options.beta * scores.rejected_ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """σ(βΔc) + 1 − σ(β(Δc − Δr)), for chosen answers that are worse than the model's own. Same
    paper, eq. 8.
    """
    chosen, rejected = options.beta * scores.chosen_ratio, options.beta * scores.rejected_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def aot(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """The smoothed logistic loss of the batch's sorted log π(c)/π(r) against its sorted
    log π_ref(c)/π_ref(r): as distributions the policy's preferences dominate the reference's.
    Melnyk et al. 2024, arXiv:2406.05882 (paired). The loss of a rank stands at the pair that has
    this rank for the policy.
    """
    policy = scores.policy_chosen - scores.policy_rejected
    reference = scores.reference_chosen - scores.reference_rejected
    return _by_rank(policy, reference, scores.real, options)


def aot_unpaired(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """As `aot`, of the sorted Δc against the sorted Δr; a rank is the chosen answer's."""
    return _by_rank(scores.chosen_ratio, scores.rejected_ratio, scores.real, options)


def _by_rank(upper: Tensor, lower: Tensor, real: Tensor, options: PreferenceOptions) -> Tensor:
    # Places without a pair go to the end of both, where they meet each other only.
    end = torch.finfo(upper.dtype).max
    upper, order = upper.where(real, end).sort()
    lower, _ = lower.where(real, end).sort()
    losses = _smoothed(options.beta * (upper - lower), options.label_smoothing)
    return torch.zeros_like(losses).index_copy(0, order, losses)


def discopop(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """−(1 − m)·log σ(βδ) + m·exp(−βδ) with m = σ(βδ/τ). Lu et al. 2024, arXiv:2406.08414, eq. 5."""
    logit = _logit(scores, options)
    sharp = logit / options.discopop_temperature
    # m·exp(−βδ) in one exponential: each alone may overflow where the other vanishes.
    exponential = torch.exp(F.logsigmoid(sharp) - logit)
    return exponential - torch.sigmoid(-sharp) * F.logsigmoid(logit)


def sigmoid_norm(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """−log σ(β(Δc / |chosen| − Δr / |rejected|)), by tokens. Tülu 3, arXiv:2411.15124."""
    return -F.logsigmoid(options.beta * _mean_difference(scores, options))


# `aot` and `aot_unpaired` compare the pairs that they are given with each other: a micro-batch's.
# Which of them read label_smoothing or the divergence is `recipe.objective`'s to know.
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo": exo,
    "nca": nca,
    "bco": bco,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}


def preference_losses(
    weights: Mapping[str, float], scores: PairScores, options: PreferenceOptions
) -> Tensor:
    """The weighted sum of several of `LOSSES` for each pair, [pairs]; 0 where there is no pair."""
    total = torch.zeros_like(scores.policy_chosen)
    for name, weight in weights.items():
        total = total + weight * LOSSES[name](scores, options)
    return total.where(scores.real, 0.0)


def preference_figures(
    scores: PairScores, chosen_rewards: Tensor, rejected_rewards: Tensor
) -> dict[str, Tensor]:
    """What is logged of pairs, as sums over those that are real; "pairs" is what to divide by.

    The rewards [pairs] are the objective's own: `implicit_rewards` for DPO, β·log π for objectives
    without a reference. An answer is preferred where its reward is strictly greater.
    """
    real = scores.real

    def total(values: Tensor) -> Tensor:
        return values.detach().where(real, 0.0).sum()

    return {
        "rewards/chosen": total(chosen_rewards),
        "rewards/rejected": total(rejected_rewards),
        "rewards/accuracies": total((chosen_rewards > rejected_rewards).to(chosen_rewards.dtype)),
        "rewards/margins": total(chosen_rewards - rejected_rewards),
        "logps/chosen": total(scores.policy_chosen),
        "logps/rejected": total(scores.policy_rejected),
        "pairs": real.sum().to(chosen_rewards.dtype),
    }


def implicit_rewards(scores: PairScores, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's implicit rewards βΔc and βΔr, both [pairs]."""
    return beta * scores.chosen_ratio, beta * scores.rejected_ratio
