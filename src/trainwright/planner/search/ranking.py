"""The best plans for a job on a machine, best first, and what became of all the others.

The grid of legal candidates is bounded from below by closed formulas, and those that cannot win or
cannot fit are discarded unseen. What is left is predicted one at a time, the likeliest first (see
`frontier`); the best are then given uneven stages, or recompute by layer, where that helps.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.planner.candidate import AXES, Candidate
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.asked import like_of
from trainwright.planner.search.cut import choose_whole
from trainwright.planner.search.devices import arrangements, fewer, orders
from trainwright.planner.search.frontier import NOISE, Predict, PredictMemory, Ranked, Search
from trainwright.planner.search.objective import Constraints, Objective
from trainwright.planner.search.recompute import fit_recompute
from trainwright.planner.search.stage_costs import with_split_layers

_POLISHED = 5  # of the best
_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble", "zbv", "dualpipev")  # plainest first


@dataclass(frozen=True)
class Ranking:
    """The best plans, best first, and counts of all the others.

    `near_misses` would have been among the best but for a constraint that they break, best first.
    Of the `considered` candidates, all legal, some were `too_large`, by the least that they hold or
    by prediction, and some `pruned` because the least that they take is more than the best ones';
    `predicted` were looked at in detail, and `unseen` were left after the likeliest. `illegal`
    counts refused combinations of degrees and of schedules, whatever they would have gone with.
    """

    best: tuple[Ranked, ...]
    near_misses: tuple[Ranked, ...] = ()
    considered: int = 0
    illegal: int = 0
    too_large: int = 0
    pruned: int = 0
    predicted: int = 0
    unseen: int = 0

    @property
    def winner(self) -> Ranked | None:
        """The best plan; None where nothing keeps the constraints."""
        return self.best[0] if self.best else None


def rank(
    job: Job,
    cluster: Cluster | Sequence[Cluster],
    *,
    like: Candidate | None = None,
    fixed: Mapping[str, Any] | None = None,
    top: int = 10,
    objective: Objective | None = None,
    constraints: Constraints | None = None,
    predictions: int = 64,
    prune: bool = True,
    predict: Predict = predict,
    predict_memory: PredictMemory = predict_memory,
) -> Ranking:
    """The `top` best plans of `job` on `cluster`, or on one of several machines to choose from.

    `like` has what is not searched (precision, optimizer, adapter, dropout, ...) and `fixed` the
    plan's fields that are given, by name (`pp`, `tp`, `zero`, `micro_batch`, `recompute`,
    `world_size`, ...): see `asked.asked_of`. At most `predictions` plans are looked at in detail;
    with `prune` off none is discarded for its bound alone. The same inputs give the same ranking.
    Raises `UserError` where no legal plan has what is fixed, or where the machine's description
    lacks what the objective is counted by.
    """
    clusters = [cluster] if isinstance(cluster, Cluster) else list(cluster)
    objective, constraints = objective or Objective(), constraints or Constraints()
    for each in clusters:
        objective.check(each)
    search = Search(
        job=job,
        like=like or like_of(job, clusters[0]),
        fixed=fixed or {},
        objective=objective,
        constraints=constraints,
        predict=predict,
        predict_memory=predict_memory,
        top=top,
        most=predictions,
        prune=prune,
    )
    _add_spaces(search, clusters, offload=False)
    search.look()
    if not search.kept and "offload" not in search.fixed:
        # The host's memory costs time, and is there for when nothing else fits.
        _add_spaces(search, clusters, offload=True)
        search.look()
    _polish(search)
    counts = search.counts
    return Ranking(
        best=tuple(in_order(search.kept, top)),
        near_misses=tuple(in_order(search.missed, top)),
        considered=counts.considered,
        illegal=counts.illegal,
        too_large=counts.too_large,
        pruned=counts.pruned,
        predicted=counts.predicted,
        unseen=search.unseen,
    )


def _add_spaces(search: Search, clusters: Sequence[Cluster], *, offload: bool) -> None:
    """All candidates on all devices; on fewer where all have none."""
    saves = set(search.objective.weights) != {"time"}
    before = search.counts.considered
    for cluster in clusters:
        for each in arrangements(search.job, cluster, search.like, search.fixed, saves=saves):
            search.add(each, offload=offload)
    if search.counts.considered > before:
        return
    for cluster in clusters if "world_size" not in search.fixed else ():
        for each in fewer(cluster):
            if search.add(each, offload=offload):
                return
    if not offload:
        what = "no way to spread this model and its batch over these devices is legal"
        if search.fixed:
            what += f" with {', '.join(f'{k}: {v}' for k, v in sorted(search.fixed.items()))}"
        fix = "leave out what is given of the layout, or change the batch or the row's length"
        raise UserError(Mistake(what, fix, key="parallel"))


def _polish(search: Search) -> None:
    """The best plans once more, with what only pays to be worked out for a few.

    Layers by what they cost in each stage, the other orders of unequal pools along the pipeline,
    parts of blocks that tensor parallelism had better leave whole, and recompute by layer.
    """
    for ranked in in_order(search.kept, _POLISHED) or in_order(search.missed, _POLISHED):
        for plan, cluster in dict.fromkeys(_variants(search, ranked)):
            if plan != ranked.plan or cluster != ranked.cluster:
                search.look_at(plan, cluster)


def _variants(search: Search, ranked: Ranked) -> Iterator[tuple[Plan, Cluster]]:
    plan, cluster, fixed = ranked.plan, ranked.cluster, search.fixed
    if "stage_layers" not in fixed:
        yield with_split_layers(search.job, plan, cluster), cluster
        if len(cluster.pools) > 1 and not plan.rows_by_replica:
            for other in orders(cluster):
                yield with_split_layers(search.job, plan, other), other
    if plan.tp > 1 and "whole" not in fixed:
        yield replace(plan, whole=choose_whole(search.job, plan, cluster)), cluster
    given = {"recompute", "recompute_by_stage", "recompute_by_layer"} & fixed.keys()
    if plan.recompute != "none" and not given and search.job.adapter is None:
        fitted = fit_recompute(search.job, plan, cluster, search.constraints.memory_bytes)
        if fitted is not None:
            yield fitted, cluster


def in_order(found: Sequence[Ranked], top: int) -> list[Ranked]:
    """The `top` best, best first; of those as good as the best that is left, the simplest."""
    left = sorted(((each.score, _order(each), each) for each in found), key=lambda e: e[:2])
    best: list[Ranked] = []
    while left and len(best) < top:
        near = bisect.bisect_right(left, left[0][0] * (1 + NOISE), key=lambda each: each[0])
        simplest = min(range(near), key=lambda index: left[index][1])
        best.append(left.pop(simplest)[2])
    return best


def simplicity(plan: Plan) -> tuple[int, ...]:
    """What is smaller is simpler: fewer dimensions first, then fewer features, then micro-batches.

    What no formula knows of a micro-batch only adds to its cost.
    """
    return (
        sum(getattr(plan, axis) > 1 for axis in AXES),
        plan.offload != "none",
        bool(plan.recompute_by_layer),
        plan.recompute != "none",
        plan.virtual_stages,
        _SCHEDULES.index(plan.schedule),
        plan.accumulation,
    )


def _order(ranked: Ranked) -> tuple[Any, ...]:
    """The simplest first, then the quickest; the rest decides ties."""
    memory = ranked.prediction.memory.total.value
    return (simplicity(ranked.plan), ranked.score, memory, ranked.plan.to_json())
