"""A frozen model beside the trained one, a reference or a teacher: its shape and its plan.

It is spread over the same workers by the same plan, so it must bear the same degrees. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from trainwright.errors import Mistake
from trainwright.models.families import DecoderConfig
from trainwright.planner.known_model import directory_tokens, known_config, known_native
from trainwright.planner.layout import split_layers
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import ModelSection, Objective


@dataclass(frozen=True)
class Beside:
    """The model: `key` of the recipe names it; None stands for what is not known yet."""

    key: str
    config: DecoderConfig | None = None
    native: bool | None = None  # one of our families
    stays: bool = True  # in memory while the other trains


def beside_of(
    objective: Objective, *, adapted: bool, model: DecoderConfig | None, native: bool | None
) -> Beside | None:
    """The second model that an objective needs; None where it needs none.

    `model` is the trained one, which is the reference too where none is named, and by itself where
    it is `adapted`: it is then as it was without its adapter.
    """
    named = objective.teacher or objective.reference
    stays = not objective.cache_reference
    if named is not None:
        key = "objective.teacher" if objective.teacher else "objective.reference"
        section = ModelSection(path=named)
        return Beside(key, known_config(section), known_native(section), stays)
    if objective.needs_reference and not adapted:
        return Beside("objective", model, native, stays)
    return None


def own_passes(objective: Objective, *, adapted: bool) -> int:
    """Further forward passes of the trained model itself a step: 1 as its own reference, else 0.

    Without its adapter it is what it was; scores that were taken once before the run need none.
    """
    named = objective.teacher or objective.reference
    own = objective.needs_reference and adapted and named is None
    return int(own and not objective.cache_reference)


def plan_beside(plan: Plan, config: DecoderConfig | None) -> Plan:
    """The plan of the model beside: stages of its own layers, and experts where it has as many."""
    layers, ep = plan.stage_layers, plan.ep
    if config is not None and sum(layers) != config.num_layers and plan.pp > 1:
        layers = split_layers(config, plan.stages)
    if config is None or config.experts is None or config.experts.count % ep:
        ep = 1
    return replace(plan, stage_layers=layers, ep=ep)


def tokens_mistake(key: str, own: Path, others: Path) -> Mistake | None:
    """What is wrong where the tokenizers in two directories number a common token differently."""
    here, there = directory_tokens(own) or {}, directory_tokens(others) or {}
    differs = next((t for t, number in here.items() if there.get(t, number) != number), None)
    if differs is None:
        return None
    return Mistake(
        f"its tokenizer is another one: {differs!r} is token {there[differs]} there, and "
        f"{here[differs]} here",
        "choose a model with the same tokenizer",
        key=key,
    )


def vocabulary_mistake(own: int, teachers: int) -> Mistake | None:
    """What is wrong with a teacher of `teachers` tokens for a model of `own`."""
    if own == teachers:
        return None
    return Mistake(
        f"the teacher's vocabulary has {teachers:,} tokens, and the model's {own:,}: their "
        "distributions cannot be compared",
        "choose a teacher and a model with one tokenizer and equal `vocab_size`",
        key="objective.teacher",
    )
