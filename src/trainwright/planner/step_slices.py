"""A predicted step as slices of time on tracks: what the trace and the report's picture draw.

A pipeline rank has a track for its kernels, one for each dimension that it waits for, and one for
the optimizer. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.schedules import Action
from trainwright.planner.timeline import Timed, Timeline

COMPUTE, OPTIMIZER = "compute", "optimizer"
_FORWARD = 1 / 3  # of a micro-batch's time, where no timeline says better


class Slice(NamedTuple):
    """Something that lasts from `start` to `end`, in seconds from the step's beginning.

    `name` is the action's kind (F, B, I, W), the dimension, or the optimizer; `stage` and
    `micro_batch` are only a pass's.
    """

    track: str
    name: str
    start: float
    end: float
    stage: int | None = None
    micro_batch: int | None = None


def step_slices(prediction: Prediction) -> list[list[Slice]]:
    """The slices of each pipeline rank: a track's are in order, and none lies over another.

    What is waited for within passes is known for the whole step only, so it is shown as the same
    share at the end of each pass.
    """
    dimension, after = after_passes(prediction)
    within = {name: seconds for name, seconds in prediction.exposed.items() if seconds > 0}
    within[dimension] = within.get(dimension, 0.0) - after
    busy = prediction.compute + sum(within.values())
    shares = {name: seconds / busy for name, seconds in within.items() if seconds > 1e-9 * busy}
    end = passes_end(prediction)
    last = [Slice(dimension, dimension, end, end + after)] if after > 0 else []
    if prediction.optimizer > 0:
        last.append(Slice(OPTIMIZER, OPTIMIZER, end + after, end + after + prediction.optimizer))
    return [[*_passes(timed, shares), *last] for timed in step_timeline(prediction).ranks]


def passes_end(prediction: Prediction) -> float:
    """Seconds from the step's beginning to the end of its last pass."""
    if prediction.timeline is not None:
        return prediction.timeline.makespan
    plan, exposed = prediction.plan, prediction.exposed
    # Without a pipeline, ZeRO-3 works within the passes and the other stages after them.
    after = exposed.get("replicas", 0.0) + (exposed.get("fsdp", 0.0) if plan.zero < 3 else 0.0)
    return prediction.compute + prediction.idle + sum(exposed.values()) - after


def after_passes(prediction: Prediction) -> tuple[str, float]:
    """What is sent once a step, when all passes are done: its dimension, and the seconds of it."""
    known = passes_end(prediction) + prediction.optimizer + prediction.constant
    seconds = max(0.0, prediction.step_seconds.value - known)
    return "fsdp" if prediction.plan.dp_shard > 1 else "replicas", seconds


def step_timeline(prediction: Prediction) -> Timeline:
    """The pipeline's, or without one a forward and a backward pass for each micro-batch."""
    if prediction.timeline is not None:
        return prediction.timeline
    end, timed = passes_end(prediction), []
    each = end / prediction.plan.accumulation
    for number in range(prediction.plan.accumulation):
        start, middle = number * each, (number + _FORWARD) * each
        timed.append(Timed(Action("F", 0, number), start, middle))
        timed.append(Timed(Action("B", 0, number), middle, start + each))
    return Timeline((tuple(timed),), end, (0.0,), (1,))


def _passes(timed: tuple[Timed, ...], shares: dict[str, float]) -> Iterator[Slice]:
    for (kind, stage, micro_batch), start, end in timed:
        last, seconds = end, end - start
        for dimension, share in shares.items():
            yield Slice(dimension, dimension, last - share * seconds, last, stage, micro_batch)
            last -= share * seconds
        yield Slice(COMPUTE, kind, start, last, stage, micro_batch)
