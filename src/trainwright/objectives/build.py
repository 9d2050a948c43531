"""From the recipe's `objective` to an Objective."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from trainwright.objectives.distill import Distill
from trainwright.objectives.judged import Judged
from trainwright.objectives.log_probs import PairScores
from trainwright.objectives.next_token import NextToken
from trainwright.objectives.objective import Objective
from trainwright.objectives.odds import contrastive_losses, mean_log_probs, orpo_losses
from trainwright.objectives.paired import Paired
from trainwright.objectives.preference import (
    PreferenceOptions,
    implicit_rewards,
    preference_losses,
)
from trainwright.objectives.scored import Scored
from trainwright.objectives.sequences import Columns
from trainwright.recipe.objective import Objective as Section


def build_objective(section: Section, columns: Columns = None) -> Objective:
    """The objective of a recipe; `columns` are the workers over which rows' tokens are cut."""
    kind = section.kind
    if kind in ("next_token", "sft"):
        return NextToken()
    if kind == "distill":
        return Distill(section.strength, section.temperature, section.mix)
    if kind == "dpo":
        return _dpo(section, columns)
    if kind == "reward":
        return Scored(section.center, columns)
    if kind == "kto":
        return Judged(
            section.strength, section.desirable_weight, section.undesirable_weight, columns
        )
    losses = {
        "orpo": partial(orpo_losses, beta=section.strength),
        "cpo": partial(
            contrastive_losses, beta=section.strength, label_smoothing=section.label_smoothing
        ),
        "simpo": partial(
            contrastive_losses,
            loss="simpo",
            beta=section.strength,
            gamma=section.margin,
        ),
    }[kind]
    by_tokens = kind in ("orpo", "simpo")

    def rewards(scores: PairScores) -> tuple[Tensor, Tensor]:
        pair = (
            mean_log_probs(scores) if by_tokens else (scores.policy_chosen, scores.policy_rejected)
        )
        return section.strength * pair[0], section.strength * pair[1]

    return Paired(losses, rewards, False, section.chosen_weight, columns)


def _dpo(section: Section, columns: Columns) -> Paired:
    weights = section.losses
    chosen_weight = weights.pop("sft", 0.0)
    options = PreferenceOptions(
        section.strength, section.label_smoothing, divergence=section.divergence
    )
    losses = partial(_weighted, weights, options) if weights else None
    rewards = partial(implicit_rewards, beta=section.strength)
    return Paired(losses, rewards, bool(weights), chosen_weight, columns)


def _weighted(weights: dict[str, float], options: PreferenceOptions, scores: PairScores) -> Tensor:
    return preference_losses(weights, scores, options)
