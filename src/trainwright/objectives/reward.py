"""The loss of a reward model: it learns to score the better of two answers higher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reward_losses(
    chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, *, center: float = 0.0
) -> Tensor:
    """−log σ(r_c − r_r − margin) + center·(r_c + r_r)² of each pair, [pairs].

    chosen and rejected are the scores of the answers, margins by how much the first should be
    ahead, all [pairs]. Bradley & Terry 1952; margins from Llama 2, arXiv:2307.09288, eq. 2; the
    term that keeps scores around 0 from Eisenstein et al. 2023, arXiv:2312.09244, eq. 2 (0.01 is
    usual).
    """
    losses = -F.logsigmoid(chosen - rejected - margins)
    return losses + center * (chosen + rejected) ** 2 if center else losses


def reward_figures(chosen: Tensor, rejected: Tensor, real: Tensor) -> dict[str, Tensor]:
    """What is logged of pairs, as sums over those that are `real`; "pairs" is what to divide by.

    chosen and rejected [pairs] are scores. A pair counts as right where the chosen answer's score
    is strictly greater.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    figures = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
    }
    sums = {name: values.where(real, 0.0).sum() for name, values in figures.items()}
    return {**sums, "pairs": real.sum().to(chosen.dtype)}
