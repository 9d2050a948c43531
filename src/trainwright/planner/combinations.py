"""Every legal plan for a model on so many workers, in a fixed order. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from trainwright.models.families import DecoderConfig
from trainwright.planner.candidate import AXES, Candidate
from trainwright.planner.layout import divisors, split_layers, split_rows
from trainwright.planner.legality import is_legal
from trainwright.planner.plan import ContextMethod, Plan, Recompute, ScheduleName
from trainwright.planner.schedules import SCHEDULES
from trainwright.recipe.schema import Adapter, Objective

_RECOMPUTES: tuple[Recompute, ...] = ("none", "full", "selective")
_MIXED: tuple[Recompute, ...] = ("full", "none", "selective", "full")  # of one layer after another
_WHOLES = ((), ("attention",), ("network",), ("attention", "network"))
_METHODS: tuple[ContextMethod, ...] = ("ring", "all_gather", "ulysses")
_SCHEDULES: tuple[ScheduleName, ...] = (
    "gpipe",
    "1f1b",
    "interleaved",
    "zero_bubble",
    "zbv",
    "dualpipev",
)


def enumerate_plans(
    config: DecoderConfig,
    world_size: int,
    *,
    sequence_length: int,
    batch_sequences: int,
    adapter: Adapter | None = None,
    objective: Objective | None = None,
) -> list[Plan]:
    """All legal plans on exactly `world_size` workers: degrees, ZeRO stages, schedules, methods.

    All train in fp32 on the same global batch, in two micro-batches a step where the rows allow
    it, so that accumulation is seen as well, and in two for each rank of a pipeline. The order is
    fixed, from few dimensions above 1 to many.
    """
    plans = []
    mixed = tuple(itertools.islice(itertools.cycle(_MIXED), config.num_layers))
    for degrees in _degrees(world_size):
        pp, dp_replicate, dp_shard, cp, tp, ep = degrees
        for zero, (schedule, virtual, layers), method, policies, whole in itertools.product(
            (1, 2, 3) if dp_shard > 1 else (0,),
            _pipelines(config, pp) if pp > 1 else (("1f1b", 1, ()),),
            _METHODS if cp > 1 else ("ring",),
            [*((policy, ()) for policy in _RECOMPUTES), ("none", mixed)],
            _WHOLES if tp > 1 else ((),),
        ):
            recompute, by_layer = policies
            candidate = Candidate(
                world=world_size,
                pp=pp,
                dp_replicate=dp_replicate,
                dp_shard=dp_shard,
                cp=cp,
                tp=tp,
                ep=ep,
                zero=zero,
                schedule=schedule,
                virtual_stages=virtual,
                stage_layers=layers,
                cp_method=method,
                whole=whole,
                recompute=recompute,
                recompute_by_layer=by_layer,
                compile=False,
                precision="fp32",
                sequence_length=sequence_length,
                rows=batch_sequences,
                device="cpu",
                model=config,
                native=True,
                adapter=adapter,
                keeps_originals=objective is not None and objective.needs_reference,
            )
            uneven = _uneven_rows(candidate) if policies == ("none", ()) else ()
            for shares in ((), uneven) if uneven else ((),):
                shared = replace(candidate, rows_by_replica=shares)
                if not shared.own_rows:
                    continue
                shared = replace(shared, micro_batch=_micro_batch(math.gcd(*shared.own_rows), pp))
                if is_legal(shared):
                    plans.append(shared.plan(threads=1, compile=False))
    return sorted(plans, key=_dimensions)


def dimensions(plan: Plan) -> tuple[str, ...]:
    """The dimensions of parallelism that are above 1."""
    return tuple(axis for axis in AXES if getattr(plan, axis) > 1)


def _dimensions(plan: Plan) -> int:
    return len(dimensions(plan))


def _degrees(world: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """pp, dp_replicate, dp_shard, cp, tp whose product is `world`, and ep within dp_shard."""
    for pp in divisors(world):
        for dp_replicate in divisors(world // pp):
            for dp_shard in divisors(world // pp // dp_replicate):
                rest = world // pp // dp_replicate // dp_shard
                for cp, ep in itertools.product(divisors(rest), divisors(dp_shard)):
                    yield pp, dp_replicate, dp_shard, cp, rest // cp, ep


def _pipelines(
    config: DecoderConfig, pp: int
) -> Iterator[tuple[ScheduleName, int, tuple[int, ...]]]:
    """Schedules, each with the stages a worker that it can have: the fewest, and two.

    Layers are shared out evenly, which () says; once, the last stage has those of the first but
    one as well.
    """
    for name in _SCHEDULES:
        kind = SCHEDULES[name]
        for virtual in (1, 2):
            if kind.least_virtual <= virtual <= (kind.most_virtual or virtual):
                yield name, virtual, ()
    first, *middle, last = split_layers(config, pp)
    if first > 1:
        yield "1f1b", 1, (1, *middle, last + first - 1)


def _uneven_rows(candidate: Candidate) -> tuple[int, ...]:
    """The batch's rows as if the first replica were three times as fast; () where they are few."""
    replicas, unit = candidate.dp_replicate, candidate.dp_shard
    assert candidate.rows is not None
    units, rest = divmod(candidate.rows, unit)
    if replicas == 1 or rest or units <= replicas:
        return ()
    return split_rows(candidate.rows, [3.0, *[1.0] * (replicas - 1)], unit)


def _micro_batch(rows: int, pp: int) -> int:
    """So many rows that there are two micro-batches a step, or two for each pipeline rank."""
    wanted = 2 * pp if pp > 1 else 2
    return rows // wanted if rows % wanted == 0 else 1
