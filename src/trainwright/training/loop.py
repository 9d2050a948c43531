"""The training loop: a batch, a step, the hooks, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trainwright.data.batches import Batches
from trainwright.optim.schedules import learning_rate
from trainwright.recipe.schema import Recipe
from trainwright.training.step import StepStats, TrainStep


class Hook(Protocol):
    """Something that happens after a step: metrics, evaluation, checkpoints."""

    def after_step(self, done: int, stats: StepStats, seconds: float, last: bool) -> None:
        """`done` steps are complete, the newest took `seconds` with its batch; `last` says that no
        other follows in this process.
        """


@dataclass
class Trainer:
    """Runs steps `start`…`total_steps` of a recipe on this worker's rows of each batch."""

    recipe: Recipe
    data: Batches
    rows: slice  # this worker's rows of the global batch
    step: TrainStep
    total_steps: int
    start: int = 0
    hooks: Sequence[Hook] = field(default_factory=list)
    stop_requested: bool = False  # set by a signal handler; all workers stop after the same step
    unfinished: bool = False  # set by a hook that was interrupted, on all workers alike
    next_index: int = 0  # of the step to come; a hook may skip some, on all workers alike

    def run(self) -> int:
        """Train; the number of complete steps, smaller than `total_steps` when asked to stop."""
        self.next_index = self.start
        while (index := self.next_index) < self.total_steps:
            self.next_index += 1
            started = time.perf_counter()
            batch = self.data.batch(index, self.rows)
            rate = learning_rate(
                index, self.total_steps, self.recipe.optimizer.learning_rate, self.recipe.schedule
            )
            stats = self.step(batch, rate, self.rows.start, self.stop_requested, index=index)
            done = index + 1
            last = done == self.total_steps or stats.stop_requested
            seconds = time.perf_counter() - started
            for hook in self.hooks:
                hook.after_step(done, stats, seconds, last or self.unfinished)
            if stats.stop_requested:
                return done
            if self.unfinished:
                return min(done, self.total_steps - 1)
        return self.total_steps
