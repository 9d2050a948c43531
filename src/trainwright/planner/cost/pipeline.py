"""How long a pipeline takes for all its micro-batches: its schedule set in time.

After some rounds a schedule repeats itself: each further `pp` micro-batches take as long as the
last. So a step of thousands is told from two shorter ones, of the same remainder. And who waits for
whom depends on the schedule alone: it is found once, and many durations are tried on it.
`planner.timeline.simulate` is the plain way, and what tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from trainwright.planner.cost.stage import StageTimes
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import Schedule, make_schedule, placement
from trainwright.planner.timeline import Timeline, simulate

_ROUNDS = 5  # of the pipeline, before it surely repeats itself
_MOST_KEPT = 4096  # actions of a timeline that somebody will look at


def pipeline_time(
    plan: Plan,
    micro_batches: int,
    times: Sequence[StageTimes],
    transfers: Sequence[float],
    *,
    whole: bool,
) -> tuple[float, Timeline | None]:
    """Seconds from the first forward pass to the last backward pass of a replica.

    `transfers` are seconds between each stage and the next. The timeline is of all micro-batches
    where the `whole` is wanted and not too long, else None.
    """
    forward = [each.forward.total for each in times]
    inputs = [each.backward_input.total for each in times]
    weights = [each.backward_weight.total for each in times]
    if whole and micro_batches * plan.stages * 2 <= _MOST_KEPT:
        schedule = make_schedule(plan.schedule, plan.pp, plan.virtual_stages, micro_batches)
        ranks = placement(plan.schedule, plan.pp, plan.virtual_stages)
        timeline = simulate(schedule, ranks, forward, inputs, weights, transfers)
        return timeline.makespan, timeline

    def makespan(many: int) -> float:
        waits = _waits(plan.schedule, plan.pp, plan.virtual_stages, many)
        return _makespan(waits, forward, inputs, weights, transfers)

    rounds = _ROUNDS * plan.pp
    if micro_batches <= rounds + plan.pp:
        return makespan(micro_batches), None
    first = rounds + micro_batches % plan.pp
    short, longer = makespan(first), makespan(first + plan.pp)
    return short + (longer - short) * (micro_batches - first) / plan.pp, None


class _Wait(NamedTuple):
    """An action: what it is (0 F, 1 B, 2 I, 3 W), its stage, and the places in the list of those
    that it waits for: its rank's last, and two others with the boundary that they come over.

    A place of -1 is nobody's, and a boundary of -1 is none.
    """

    kind: int
    stage: int
    last: int
    needed: int
    boundary: int
    other: int
    other_boundary: int


@lru_cache(maxsize=512)
def _waits(name: str, pp: int, virtual_stages: int, micro_batches: int) -> tuple[_Wait, ...]:
    """The schedule's actions in an order in which each comes after those that it waits for."""
    schedule = make_schedule(name, pp, virtual_stages, micro_batches)
    return _ordered(schedule, placement(name, pp, virtual_stages))


def _ordered(schedule: Schedule, ranks: Sequence[int]) -> tuple[_Wait, ...]:
    stages, kinds = len(ranks), {"F": 0, "B": 1, "I": 2, "W": 3}
    at: dict[tuple[str, int, int], int] = {}  # B stands as I: either gives what is needed
    found: list[_Wait] = []
    reached, last = [0] * len(schedule), [-1] * len(schedule)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while reached[rank] < len(actions):
                kind, stage, micro = actions[reached[rank]]
                if kind == "F":
                    needs = [("F", stage - 1, micro)] if stage else []
                elif kind == "W":
                    needs = [("I", stage, micro)]
                else:
                    needs = [("F", stage, micro)]
                    needs += [("I", stage + 1, micro)] if stage + 1 < stages else []
                places = [at.get(need, -2) for need in needs]
                if -2 in places:
                    break
                ends = [min(need[1], stage) if ranks[need[1]] != rank else -1 for need in needs]
                places += [-1] * (2 - len(places))
                ends += [-1] * (2 - len(ends))
                at["I" if kind == "B" else kind, stage, micro] = len(found)
                found.append(
                    _Wait(kinds[kind], stage, last[rank], places[0], ends[0], places[1], ends[1])
                )
                last[rank] = len(found) - 1
                reached[rank] += 1
                moved = True
    return tuple(found)


def _makespan(
    waits: Sequence[_Wait],
    forward: Sequence[float],
    inputs: Sequence[float],
    weights: Sequence[float],
    transfers: Sequence[float],
) -> float:
    whole = [i + w for i, w in zip(inputs, weights, strict=True)]
    lasts = (forward, whole, inputs, weights)
    passes = [*transfers, 0.0]  # the last for a boundary of -1
    ends = [0.0] * (len(waits) + 1)  # likewise for nobody
    for index, (kind, stage, last, needed, boundary, other, other_boundary) in enumerate(waits):
        start = ends[last]
        arrives = ends[needed] + passes[boundary]
        if needed >= 0 and arrives > start:
            start = arrives
        if other >= 0:
            arrives = ends[other] + passes[other_boundary]
            if arrives > start:
                start = arrives
        ends[index] = start + lasts[kind][stage]
    return max(ends)
