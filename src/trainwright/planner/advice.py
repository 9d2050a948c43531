"""The shortest changes of a recipe that make it fit into memory, the least slow first. No torch."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trainwright.errors import UserError
from trainwright.planner.budget import Budget
from trainwright.planner.layout import divisors
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Adapter, Recipe

Estimate = Callable[[Recipe], Budget]
MOST_SHOWN = 3
_SHORTEST_ROW = 256


@dataclass(frozen=True)
class Change:
    """Values of the recipe by their keys, and about what share of its speed they cost.

    The costs are rough, and only put changes in order.
    """

    values: dict[str, Any]
    cost: float

    def __str__(self) -> str:
        return " and ".join(f"`{key}: {_yaml(value)}`" for key, value in self.values.items())

    def __add__(self, other: Change) -> Change:
        return Change(self.values | other.values, self.cost + other.cost)

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with these values."""
        sections: dict[str, Any] = {}
        for key, value in self.values.items():
            name, _, field = key.partition(".")
            section = sections.get(name, getattr(recipe, name))
            sections[name] = section.model_copy(update={field: value}) if field else value
        return recipe.model_copy(update=sections)


@dataclass(frozen=True)
class Advice:
    """A change that makes the recipe fit, and the bytes that a worker would then hold."""

    change: Change
    total: float


def advise(
    recipe: Recipe, plan: Plan, estimate: Estimate, limit: float | None = None
) -> list[Advice]:
    """The best changes with which a worker fits into `limit`, or its own; none if none is found.

    `plan` is the recipe's own. One change is preferred to two, and two to three; what changes the
    result (shorter rows, an adapter in place of the whole model) comes only where nothing else
    helps. `estimate` raises UserError for a recipe that cannot be planned.
    """
    gentle = list(gentle_changes(recipe, plan))
    every = [*gentle, *drastic_changes(recipe)]
    for changes, size in itertools.product((gentle, every), (1, 2, 3)):
        if changes is gentle and size == 3:
            continue
        found = sorted(_fitting(recipe, estimate, limit, _combined(changes, size)), key=_order)
        if found:
            return _different(found)[:MOST_SHOWN]
    return []


def _fitting(
    recipe: Recipe, estimate: Estimate, limit: float | None, changes: Iterable[Change]
) -> Iterator[Advice]:
    for change in changes:
        try:
            budget = estimate(change.applied(recipe))
        except UserError:
            continue
        if budget.fits(limit):
            yield Advice(change, budget.total)


def _combined(changes: list[Change], size: int) -> list[Change]:
    """Each choice of `size` changes of different keys."""
    every = []
    for chosen in itertools.combinations(changes, size):
        keys = [key for change in chosen for key in change.values]
        if len(set(keys)) == len(keys):
            every.append(functools.reduce(operator.add, chosen))
    return every


def _order(advice: Advice) -> tuple[float, float]:
    return advice.change.cost, advice.total


def _different(found: list[Advice]) -> list[Advice]:
    """The first of those that change the same keys."""
    seen: dict[frozenset[str], Advice] = {}
    for advice in found:
        seen.setdefault(frozenset(advice.change.values), advice)
    return list(seen.values())


def gentle_changes(recipe: Recipe, plan: Plan) -> Iterator[Change]:
    """Changes with which the run learns the same, or nearly, on the same global batch."""
    for rows in divisors(plan.micro_batch * plan.accumulation):
        if rows < plan.micro_batch:
            cost = 0.03 * math.log2(plan.micro_batch / rows)
            yield Change({"parallel.micro_batch": rows}, cost)
    if recipe.objective.needs_reference and not recipe.objective.cache_reference:
        yield Change({"objective.cache_reference": True}, 0.01)
    yield from _sharding(recipe, plan)
    yield from _optimizers(recipe, plan)
    if not (recipe.parallel.recompute_by_stage or recipe.parallel.recompute_by_layer):
        costs = {"selective": 0.1, "auto": 0.15, "full": 0.3}
        if recipe.training.recompute != "none":
            costs.pop("selective")
        if recipe.training.recompute == "auto":
            costs.pop("auto")
        if recipe.training.recompute != "full":
            yield from (Change({"training.recompute": name}, cost) for name, cost in costs.items())
    if plan.device == "cuda" and not plan.activation_offload:
        yield Change({"training.activation_offload": True}, 0.25)
    adapter = recipe.adapter
    if adapter is not None and adapter.quantise == "none" and adapter.init != "pissa":
        yield Change({"adapter.quantise": "nf4"}, 0.2)


def _sharding(recipe: Recipe, plan: Plan) -> Iterator[Change]:
    if plan.dp_replicate > 1:
        shards = plan.dp_replicate * plan.dp_shard
        given = {"parallel.dp_replicate": 1} if recipe.parallel.dp_replicate is not None else {}
        yield Change({**given, "parallel.dp_shard": shards}, 0.1)
    for stage in range(plan.zero + 1, 4) if plan.zero else ():
        yield Change({"parallel.zero": stage}, 0.05 * (stage - plan.zero))
    workers = recipe.parallel.workers
    if plan.device == "cpu" and isinstance(workers, int) and workers > 1:
        yield Change({"parallel.workers": workers // 2}, 0.15)  # each has more, of the same cores


def _optimizers(recipe: Recipe, plan: Plan) -> Iterator[Change]:
    name = recipe.optimizer.name
    if name == "adamw":
        yield Change({"optimizer.name": "adamw-8bit"}, 0.02)
    if plan.device != "cuda" or plan.offload != "none":
        return
    if name == "adamw":
        yield Change({"optimizer.name": "paged-adamw"}, 0.3)
    if name in ("adamw", "adamw-8bit"):
        yield Change({"optimizer.name": "paged-adamw-8bit"}, 0.15)
        yield Change({"parallel.offload": "optimizer"}, 0.4)
    if plan.dp_shard > 1:
        yield Change({"parallel.offload": "parameters"}, 0.7)


def drastic_changes(recipe: Recipe) -> Iterator[Change]:
    """Changes with which the run learns something else."""
    length = recipe.data.sequence_length
    for share in (2, 4):
        if length % share == 0 and length // share >= _SHORTEST_ROW:
            yield Change({"data.sequence_length": length // share}, 0.5 * share)
    if recipe.adapter is None and recipe.model.path is not None:
        yield Change({"adapter": Adapter(rank=16)}, 3.0)
        yield Change({"adapter": Adapter(rank=16, quantise="nf4")}, 3.2)


def _yaml(value: Any) -> str:
    if isinstance(value, Adapter):
        given = {key: getattr(value, key) for key in ("rank", "quantise")}
        inner = ", ".join(f"{key}: {each}" for key, each in given.items() if each != "none")
        return f"{{{inner}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
