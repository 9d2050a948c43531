"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from trainwright.recipe.schema import Schedule


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Steps of linear warm-up; a value below 1 is a share of the run."""
    if schedule.warmup < 1:
        return round(schedule.warmup * total_steps)
    return min(int(schedule.warmup), total_steps)


def learning_rate(step: int, total_steps: int, peak: float, schedule: Schedule) -> float:
    """Learning rate of `step` (from 0) in a run of `total_steps`.

    Warm-up rises linearly and reaches `peak` on its last step; the last step of the run has
    `schedule.final` × `peak`, except under `constant`.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    start = warmup
    if schedule.name == "wsd":
        start = max(warmup, total_steps - round(schedule.decay * total_steps))
        if step < start:
            return peak
    progress = min(1.0, (step - start + 1) / max(1, total_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.final + (1 - schedule.final) * shape)
