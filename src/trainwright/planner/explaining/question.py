"""A recipe and the machines to choose from, ready to be searched. No torch.

What the recipe says of its layout names a plan; the search for the best one does without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.models.families import DecoderConfig
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.job import Job
from trainwright.planner.known_model import known_config
from trainwright.planner.search.asked import Asked, asked_of
from trainwright.planner.search.grid import FIELDS, GIVEN
from trainwright.planner.search.objective import Constraints, Objective
from trainwright.planner.search.ranking import Ranking, rank
from trainwright.recipe.parallel import Parallel
from trainwright.recipe.schema import Recipe

# What a search keeps to, that is no layout.
_COMMON = ("world_size", "threads", "activation_offload")
_OPEN = ("workers", "threads")
_DEFAULTS = ("pp", "tp", "cp", "ep", "cp_method", "schedule", "offload")


@dataclass(frozen=True)
class Question:
    """What is to be trained, on which machines, and what the best plan is the best by.

    `clusters` are descriptions of one machine, of which the best is taken: a CPU's cores can be
    shared out over more or fewer workers.
    """

    recipe: Recipe
    config: DecoderConfig
    clusters: Sequence[Cluster]
    objective: Objective = field(default_factory=Objective)

    @property
    def asked(self) -> Asked:
        """What the recipe asks for."""
        return asked_of(self.recipe, self.config, self.clusters[0], has_compiler=True)

    @property
    def job(self) -> Job:
        """What is trained, apart from how it is spread."""
        return self.asked.job

    @property
    def layout(self) -> dict[str, Any]:
        """What the recipe says of the layout, by the names of the plan's fields."""
        fixed = self.asked.fixed
        return {name: fixed[name] for name in (*FIELDS, *GIVEN) if name in fixed}

    @property
    def named(self) -> dict[str, Any]:
        """The same, with what a run takes to be so where the recipe does not say."""
        defaults = {name: getattr(self.recipe.parallel, name) for name in _DEFAULTS}
        return {**defaults, "recompute": self.recipe.training.recompute, **self.layout}

    @property
    def tokens(self) -> float | None:
        """Of the whole run; None where only the data tells."""
        training = self.recipe.training
        if training.steps is not None:
            return float(training.steps * self.job.batch_tokens)
        return None if training.tokens is None else float(training.tokens)

    def best(
        self,
        top: int = 10,
        layout: Mapping[str, Any] | None = None,
        predictions: int = 64,
        memory_bytes: float | None = None,
    ) -> Ranking:
        """The best plans with this layout, or (None) with any, whatever the recipe says of it.

        At most `predictions` are looked at in detail; none may hold more than `memory_bytes`.
        """
        asked = replace(self, recipe=_laid_out(self.recipe, layout or {})).asked
        common = {name: value for name, value in asked.fixed.items() if name in _COMMON}
        return rank(
            asked.job,
            self._large_enough(asked),
            like=asked.like,
            fixed={**common, **(layout or {})},
            top=top,
            objective=self.objective,
            constraints=Constraints(memory_bytes=memory_bytes),
            predictions=predictions,
        )

    def _large_enough(self, asked: Asked) -> list[Cluster]:
        """The machines on which the workers that are asked for find a device each, if any."""
        workers = asked.fixed.get("world_size", 0)
        return [each for each in self.clusters if each.devices >= workers] or list(self.clusters)


def ask(
    recipe: Recipe, clusters: Sequence[Cluster], objective: Objective | None = None
) -> Question:
    """The question of a recipe. Raises `UserError` where its model is not known here."""
    config = known_config(recipe.model, recipe.tokenizer, recipe.objective)
    if config is None:
        what = "the model's shape is not known here, so nothing can be told of its cost"
        fix = "give the folder that has its config.json, of a family that Trainwright has"
        raise UserError(Mistake(what, fix, key="model.path"))
    return Question(recipe, config, clusters, objective or Objective())


def _laid_out(recipe: Recipe, layout: Mapping[str, Any]) -> Recipe:
    """The recipe with this layout and no more of one."""
    parallel, training = recipe.parallel, recipe.training
    kept = {name: getattr(parallel, name) for name in parallel.model_fields_set & {*_OPEN}}
    # A recipe has no word for zero 0: that nothing is sharded says it.
    kept |= {n: value for n, value in layout.items() if n in Parallel.model_fields and value != 0}
    recompute = {"recompute": layout.get("recompute", "none")}
    return recipe.model_copy(
        update={
            "parallel": Parallel.model_validate(kept),
            "training": training.model_copy(update=recompute),
        }
    )
