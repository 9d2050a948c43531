"""One optimizer step: micro-batches forward and backward, reduce, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainwright.data.batches import Batch
from trainwright.errors import Mistake, UserError
from trainwright.optim.clip import clip_factor, gradient_norm, scale_gradients
from trainwright.optim.optimizers import set_learning_rate
from trainwright.parallel.precision import LossScale, autocast, is_finite
from trainwright.parallel.shard import synchronise_gradients
from trainwright.parallel.spread import SpreadModel
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan

Objective = Callable[[nn.Module, Mapping[str, Tensor | None]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepStats:
    """What a step did, over the whole global batch."""

    loss: float  # mean over trained targets
    gradient_norm: float  # before clipping
    learning_rate: float
    targets: int
    batch_hash: str
    skipped: bool  # fp16 only: the gradients overflowed, the scale was halved, nothing changed
    stop_requested: bool  # some worker was asked to stop after this step


class TrainStep:
    """Calls the objective on a global batch's rows of this worker and updates the model."""

    def __init__(
        self,
        spread: SpreadModel,
        optimizers: Sequence[torch.optim.Optimizer],
        objective: Objective,
        plan: Plan,
        world: World,
        gradient_clip: float | None,
    ) -> None:
        self.spread = spread
        self.optimizers = optimizers
        self.objective = objective
        self.plan = plan
        self.world = world
        self.gradient_clip = gradient_clip
        self.loss_scale = LossScale(plan.precision)
        self.parameters = [p for p in spread.model.parameters() if p.requires_grad]

    def __call__(
        self, batch: Batch, learning_rate: float, first_row: int, stop_requested: bool = False
    ) -> StepStats:
        """Train on `batch`, this worker's rows, the first of which is `first_row` of the global."""
        # One reduction tells every worker three things: how much the global batch weighs, which
        # batch it is, and whether somebody was asked to stop.
        shared = self.world.sum(
            torch.tensor([batch.weight, ordered_hash(batch, first_row), int(stop_requested)])
        ).tolist()
        weight, batch_hash, stops = shared
        if weight == 0:
            raise UserError(
                "a batch holds no target to train on: every position of it is masked or padding",
                fix="look at it with `trainwright data RECIPE`",
            )

        losses = self._accumulate(batch, weight)
        loss = self.world.sum(torch.stack(losses).sum().to(torch.float64)) / weight

        norm = gradient_norm(self.parameters) / self.loss_scale.value
        if self.loss_scale.dynamic and not is_finite(norm):
            skipped = True
            self.loss_scale.update(finite=False)
        else:
            skipped = False
            factor = clip_factor(norm, self.gradient_clip) / self.loss_scale.value
            if self.gradient_clip is not None or self.loss_scale.dynamic:
                scale_gradients(self.parameters, factor)
            set_learning_rate(self.optimizers, learning_rate)
            for optimizer in self.optimizers:
                optimizer.step()
            self.loss_scale.update(finite=True)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

        stats = StepStats(
            loss=loss.item(),
            gradient_norm=norm.item(),
            learning_rate=learning_rate,
            targets=weight,
            batch_hash=f"{batch_hash % 2**64:016x}",
            skipped=skipped,
            stop_requested=stops > 0,
        )
        self._refuse_broken_numbers(stats, losses, batch)
        return stats

    def _accumulate(self, batch: Batch, weight: int) -> list[Tensor]:
        """Backward over all micro-batches; their loss sums, detached."""
        losses = []
        starts = range(0, len(batch.input_ids), self.plan.micro_batch)
        for start in starts:
            tensors = to_tensors(batch, start, start + self.plan.micro_batch, self.world.device)
            synchronise_gradients(self.spread.forward, wanted=start == starts[-1])
            with compute_context(self.spread, self.plan.precision, self.world.device):
                loss, _ = self.objective(self.spread.forward, tensors)
            (loss * (self.loss_scale.value / weight)).backward()
            losses.append(loss.detach())
        return losses

    def _refuse_broken_numbers(
        self, stats: StepStats, losses: Sequence[Tensor], batch: Batch
    ) -> None:
        """Stop on NaN or Inf, naming the documents; nothing has been saved since the update."""
        broken_loss = stats.loss - stats.loss != 0
        broken_norm = stats.gradient_norm - stats.gradient_norm != 0 and not stats.skipped
        if not (broken_loss or broken_norm or self.loss_scale.exhausted):
            return
        suspects: list[str] = []
        for index, loss in enumerate(losses):
            if not torch.isfinite(loss):
                start = index * self.plan.micro_batch
                for row in batch.documents[start : start + self.plan.micro_batch]:
                    suspects.extend(row)
        suspects = [name for names in self.world.gather(suspects) for name in names]
        if not suspects:
            suspects = [name for row in batch.documents for name in row]
            suspects = [name for names in self.world.gather(suspects) for name in names]
        raise BrokenNumbersError(stats, suspects, self.plan.precision)


class BrokenNumbersError(UserError):
    """The loss or the gradients became NaN or infinite."""

    def __init__(self, stats: StepStats, documents: Sequence[str], precision: str) -> None:
        what = "loss" if stats.loss - stats.loss != 0 else "gradient norm"
        value = stats.loss if what == "loss" else stats.gradient_norm
        names = list(dict.fromkeys(documents))
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        advice = "lower optimizer.learning_rate or lengthen schedule.warmup, under another `name`"
        if precision == "fp16":
            advice += ", or use training.precision: bf16"
        self.stats, self.documents = stats, names
        super().__init__(
            Mistake(
                f"the {what} became {value}; its batch ({stats.batch_hash}) holds {listed}",
                fix=f"{advice}; the checkpoints saved before are untouched",
            )
        )


def compute_context(
    spread: SpreadModel, precision: str, device: torch.device
) -> AbstractContextManager:
    """Autocast for whole weights; sharded weights are narrowed by their own policy."""
    return autocast("fp32" if spread.sharded else precision, device)


def to_tensors(
    batch: Batch, start: int, stop: int, device: torch.device
) -> dict[str, Tensor | None]:
    """Rows `start`…`stop` of `batch` on the device."""

    def move(array: NDArray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array[start:stop]).to(device)

    return {
        "input_ids": move(batch.input_ids),
        "labels": move(batch.labels),
        "position_ids": move(batch.position_ids),
        "segment_ids": move(batch.segment_ids),
    }


def ordered_hash(batch: Batch, first_row: int) -> int:
    """A number that, summed over the workers, identifies the rows of a batch and their order."""
    total = 0
    for row, value in enumerate(batch.row_hashes(), start=first_row):
        total += value * (2 * row + 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total
