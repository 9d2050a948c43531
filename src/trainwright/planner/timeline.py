"""What a pipeline schedule costs: its actions set in time, by durations of each stage.

An event simulation: a rank does its actions in order, each as soon as the rank is free and what it
needs has arrived. Stages may differ, so uneven splits, embeddings and heads are told as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainwright.planner.schedules import Action, Schedule


class Timed(NamedTuple):
    """An action with its start and end, in the unit of the durations."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step of a pipeline; a tuple of all values has one for each rank."""

    ranks: tuple[tuple[Timed, ...], ...]
    makespan: float
    idle: tuple[float, ...]  # share of the makespan in which a rank does nothing
    in_flight: tuple[int, ...]  # most pairs of stage and micro-batch whose activations are kept


def simulate(
    schedule: Schedule,
    placement: Sequence[int],
    forward: Sequence[float],
    backward_input: Sequence[float],
    backward_weight: Sequence[float],
    transfer: float | Sequence[float] = 0.0,
) -> Timeline:
    """`schedule` in time; durations are one for each stage, B taking I and W together.

    `transfer` passes between the end of an action and its result's arrival on another rank, one for
    all or one from each stage to the next; it keeps no rank busy. Raises ValueError where the
    actions wait for one another for ever, or for one that is in nobody's list.
    """
    lasts = {
        "F": forward,
        "B": [i + w for i, w in zip(backward_input, backward_weight, strict=True)],
        "I": backward_input,
        "W": backward_weight,
    }
    if isinstance(transfer, (int, float)):
        transfer = [transfer] * len(placement)
    done: dict[Action, float] = {}
    ranks: list[list[Timed]] = [[] for _ in schedule]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            timed = ranks[rank]
            while len(timed) < len(actions):
                action = actions[len(timed)]
                start = timed[-1].end if timed else 0.0
                needed = [_provider(need, done) for need in needs(action, len(placement))]
                if None in needed:
                    break
                for need in needed:
                    assert need is not None
                    far = placement[need.stage] != placement[action.stage]
                    passes = transfer[min(need.stage, action.stage)] if far else 0.0
                    start = max(start, done[need] + passes)
                done[action] = start + lasts[action.kind][action.stage]
                timed.append(Timed(action, start, done[action]))
                moved = True
    blocked = [
        f"rank {rank} at {actions[len(timed)]}"
        for rank, (actions, timed) in enumerate(zip(schedule, ranks, strict=True))
        if len(timed) < len(actions)
    ]
    if blocked:
        raise ValueError(f"the schedule comes to a halt: {', '.join(blocked)}")
    makespan = max(done.values(), default=0.0)
    return Timeline(
        ranks=tuple(tuple(timed) for timed in ranks),
        makespan=makespan,
        idle=tuple(_idle(timed, makespan) for timed in ranks),
        in_flight=tuple(most_in_flight(actions) for actions in schedule),
    )


def needs(action: Action, stages: int) -> list[Action]:
    """What must be done before `action`: its neighbour's result, and its own stage's pass before.

    A whole backward pass stands in the list as its I: either gives what is needed.
    """
    kind, stage, micro_batch = action
    if kind == "F":
        return [Action("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [Action("I", stage, micro_batch)]
    own = Action("F", stage, micro_batch)
    return [own, Action("I", stage + 1, micro_batch)] if stage + 1 < stages else [own]


def most_in_flight(actions: Sequence[Action]) -> int:
    """Most (stage, micro-batch) pairs that a rank has gone forward with and not wholly back."""
    held, most = Counter[str](), 0
    for action in actions:
        held[action.kind] += 1
        most = max(most, held["F"] - held["B"] - held["W"])
    return most


def _provider(need: Action, done: dict[Action, float]) -> Action | None:
    """The action done that gives what `need` would: itself, or for I the whole backward pass."""
    if need in done:
        return need
    whole = need._replace(kind="B")
    return whole if need.kind == "I" and whole in done else None


def _idle(timed: Sequence[Timed], makespan: float) -> float:
    busy = sum(end - start for _, start, end in timed)
    return 1 - busy / makespan if makespan else 0.0
