"""Pipeline schedules as data: which stage works on which micro-batch, in which order, on each rank.

A schedule is one list of actions a rank. `parallel.pipeline` executes it, `planner.timeline` tells
what it costs, and tests hold it against the closed formulas. Nothing here knows of tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trainwright.errors import Mistake

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One piece of work on one micro-batch.

    F is a forward pass and B a whole backward pass; split schedules go backward in two pieces, I
    (gradients of the inputs, which the stage before waits for) and W (gradients of the weights).
    """

    kind: Kind
    stage: int
    micro_batch: int


Schedule = list[list[Action]]  # one list for each rank of the pipeline


@dataclass(frozen=True)
class ScheduleKind:
    """What a schedule asks for, and whether it splits backward passes."""

    splits: bool = False
    in_v: bool = False  # stages go down the ranks and up again, two on each; else round and round
    least_virtual: int = 1
    most_virtual: int | None = 1


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(),
    "1f1b": ScheduleKind(),
    "interleaved": ScheduleKind(least_virtual=2, most_virtual=None),
    "zero_bubble": ScheduleKind(splits=True, most_virtual=None),
    "zbv": ScheduleKind(splits=True, in_v=True, least_virtual=2, most_virtual=2),
    "dualpipev": ScheduleKind(splits=True, in_v=True, least_virtual=2, most_virtual=2),
}


def splits_backward(name: str) -> bool:
    """Whether the schedule has I and W actions."""
    return SCHEDULES[name].splits


def placement(name: str, ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """The rank of each stage, `ranks` × `virtual_stages` of them."""
    if SCHEDULES[name].in_v:
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(range(ranks)) * virtual_stages


def schedule_mistakes(
    name: str, ranks: int, virtual_stages: int, micro_batches: int
) -> list[Mistake]:
    """Why there is no such schedule, each with the nearest that there is; empty where there is."""
    if name not in SCHEDULES:
        close = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0)
        what = f"there is no schedule {name!r}"
        return [Mistake(what, f"write `schedule: {close[0]}`", key="parallel.schedule")]
    kind, mistakes = SCHEDULES[name], []
    if virtual_stages < kind.least_virtual:
        what = f"schedule {name} needs {kind.least_virtual} stages a rank: {virtual_stages}"
        fix = f"write `virtual_stages: {kind.least_virtual}`, or `schedule: 1f1b`"
        mistakes.append(Mistake(what, fix, key="parallel.virtual_stages"))
    elif kind.most_virtual is not None and virtual_stages > kind.most_virtual:
        stages = "1 stage" if kind.most_virtual == 1 else f"{kind.most_virtual} stages"
        what = f"schedule {name} has {stages} a rank: {virtual_stages}"
        fix = f"write `virtual_stages: {kind.most_virtual}`, or `schedule: interleaved`"
        mistakes.append(Mistake(what, fix, key="parallel.virtual_stages"))
    least = 2 * ranks if name == "dualpipev" else 1
    if micro_batches < least:
        what = (
            f"schedule {name} on {ranks} ranks needs {least} micro-batches a step: {micro_batches}"
        )
        fix = "write a smaller `micro_batch` or a larger batch"
        if least > 1:
            fix += ", or `schedule: zbv`, which takes any number"
        mistakes.append(Mistake(what, fix, key="parallel.micro_batch"))
    return mistakes


def make_schedule(name: str, ranks: int, virtual_stages: int, micro_batches: int) -> Schedule:
    """The actions of each rank, in order. Raises ValueError where `schedule_mistakes` has any.

    On every stage, micro-batches come in their order, forward and backward alike: what travels
    over one boundary in one direction can be told apart by its turn.
    """
    mistakes = schedule_mistakes(name, ranks, virtual_stages, micro_batches)
    if mistakes:
        raise ValueError("; ".join(str(mistake) for mistake in mistakes))
    if name == "zbv":
        # Its phases need this many; those past the real ones are left out again, which nothing
        # else waits for.
        padded = max(micro_batches, 2 * ranks - 1)
        schedule = [_zbv(rank, ranks, padded) for rank in range(ranks)]
        return [[a for a in actions if a.micro_batch < micro_batches] for actions in schedule]
    if name == "dualpipev":
        return [_dualpipev(rank, ranks, micro_batches) for rank in range(ranks)]
    if name == "gpipe":
        return [_gpipe(rank, micro_batches) for rank in range(ranks)]
    split = splits_backward(name)
    return [
        _alternating(rank, ranks, virtual_stages, micro_batches, split) for rank in range(ranks)
    ]


def _gpipe(rank: int, micro_batches: int) -> list[Action]:
    """All forward, then all backward (Huang et al. 2019)."""
    return [
        *(Action("F", rank, m) for m in range(micro_batches)),
        *(Action("B", rank, m) for m in range(micro_batches)),
    ]


def _alternating(
    rank: int, ranks: int, virtual_stages: int, micro_batches: int, split: bool
) -> list[Action]:
    """Some forward to warm up, then one forward and one backward in turn, then the rest backward.

    With one stage a rank this is 1F1B (Narayanan et al. 2019), with more the interleaved schedule
    (Narayanan et al. 2021). Split, a weight gradient waits until `rank` later input gradients are
    done, which fills the wait for gradients on the later ranks and keeps no more micro-batches
    than the first rank keeps anyway: ZB-H1 (Qi et al. 2023).
    """
    groups = _groups(ranks, micro_batches)
    forward = list(_round_and_round(groups, ranks, range(rank, ranks * virtual_stages, ranks)))
    backward = list(
        _round_and_round(groups, ranks, range(rank, ranks * virtual_stages, ranks)[::-1])
    )
    # Interleaved stages need twice the distance to the last rank: the next micro-batch of the
    # group comes round before the first gradient does. Split, a backward pass takes half the time.
    reach = ranks - 1 - rank if split or virtual_stages == 1 else 2 * (ranks - 1 - rank)
    warm_up = min(reach + (virtual_stages - 1) * groups[0], len(forward))

    actions = [Action("F", *place) for place in forward[:warm_up]]
    waiting: list[tuple[int, int]] = []
    for done, place in enumerate(backward):
        if warm_up + done < len(forward):
            actions.append(Action("F", *forward[warm_up + done]))
        if not split:
            actions.append(Action("B", *place))
            continue
        actions.append(Action("I", *place))
        waiting.append(place)
        if len(waiting) > rank:
            actions.append(Action("W", *waiting.pop(0)))
    return actions + [Action("W", *place) for place in waiting]


def _groups(ranks: int, micro_batches: int) -> list[int]:
    """Sizes of the groups of micro-batches that go through a rank's stages together.

    `ranks` at least where there are so many: in a smaller group a stage would wait for the one
    before it. The larger groups come first.
    """
    count = max(1, micro_batches // ranks)
    small, larger = divmod(micro_batches, count)
    return [small + (index < larger) for index in range(count)]


def _round_and_round(groups: list[int], ranks: int, stages: range) -> Iterator[tuple[int, int]]:
    """(stage, micro-batch): each group through all of a rank's stages before the next group."""
    first = 0
    for size in groups:
        for stage in stages:
            yield from ((stage, first + index) for index in range(size))
        first += size


class _InV:
    """Writes down the actions of a rank that has a stage on the way down and one on the way up."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stages = {"down": rank, "up": 2 * ranks - 1 - rank}
        self.forward = {"down": 0, "up": 0}  # micro-batches so far
        self.backward = {"down": 0, "up": 0}
        self.waiting: list[tuple[str, int]] = []  # weight gradients, oldest first
        self.actions: list[Action] = []

    def add(self, *steps: str) -> None:
        """Steps such as "F down", each on the next micro-batch; "W" alone is the oldest of any."""
        for step in steps:
            kind, _, way = step.partition(" ")
            if kind == "W":
                place = next(p for p in self.waiting if p[0] == (way or p[0]))
                self.waiting.remove(place)
                way, micro_batch = place
            else:
                done = self.forward if kind == "F" else self.backward
                micro_batch = done[way]
                done[way] += 1
            if kind == "I":
                self.waiting.append((way, micro_batch))
            self.actions.append(Action(kind, self.stages[way], micro_batch))  # type: ignore[arg-type]


def _zbv(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """ZB-V (Qi et al. 2024): no bubble where F, I and W take equal times; 1F1B's memory.

    Needs 2 · ranks - 1 micro-batches.
    """
    v, later = _InV(rank, ranks), ranks - rank
    v.add(*["F down"] * (2 * later - 1))
    v.add(*["F up", "F down"] * rank)
    v.add(*["F up", "I up", "W up"] * later)
    while v.forward["up"] < micro_batches:
        if v.forward["down"] < micro_batches:
            v.add("F down")
        v.add("I down", "W down", "F up", "I up", "W up")
    # Input gradients first, for others wait for them; weights fill what would be idle.
    v.add(*["I down", "I up"] * rank)
    v.add(*["I down", "W down"] * later)
    v.add(*["W"] * len(v.waiting))
    return v.actions


def _dualpipev(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """DualPipe cut in half (DeepSeek-AI 2025): forward of one way beside backward of the other.

    Needs 2 · ranks micro-batches. Backward passes are whole but where the pipeline fills and
    drains.
    """
    v, later = _InV(rank, ranks), ranks - 1 - rank
    v.add(*["F down"] * (2 * later))
    v.add(*["F down", "F up"] * (rank + 1))
    v.add(*["I up", "W", "F up"] * later)
    v.add(*["F down", "B up", "F up", "B down"] * (micro_batches - 2 * ranks + rank + 1))
    v.add(*["B up", "F up", "B down"] * later)
    # As it drains, every backward pass after the first half of these delays its weights.
    draining = ["up", "down"] * (rank + 1)
    v.add(*(f"{'B' if n <= rank else 'I'} {way}" for n, way in enumerate(draining)))
    v.add(*["W", "I down"] * later)
    v.add(*["W"] * len(v.waiting))
    return v.actions
