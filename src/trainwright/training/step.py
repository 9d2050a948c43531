"""One optimizer step: micro-batches forward and backward, reduce, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from trainwright.data.batches import Batch
from trainwright.errors import Mistake, UserError
from trainwright.models.decoder import Decoder
from trainwright.objectives.objective import Objective, Sums
from trainwright.optim.clip import clip_factor, scale_gradients
from trainwright.optim.optimizers import set_learning_rate
from trainwright.parallel.precision import LossScale, is_finite
from trainwright.parallel.spread import SpreadModel
from trainwright.recipe.schema import Training
from trainwright.training.micro_batches import (
    counts_losses,
    counts_rows,
    to_tensors,
    train_micro_batches,
)
from trainwright.training.reference import Reference
from trainwright.training.routers import Routers


@dataclass(frozen=True)
class StepStats:
    """What a step did, over the whole global batch."""

    loss: float  # mean over trained targets, or whatever the objective divides by
    gradient_norm: float  # before clipping
    learning_rate: float
    targets: int
    batch_hash: str
    skipped: bool  # fp16 only: the gradients overflowed, the scale was halved, nothing changed
    stop_requested: bool  # some worker was asked to stop after this step
    # How evenly a mixture's experts were loaded; empty for other models.
    router: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)  # the objective's own


class TrainStep:
    """Calls the objective on a global batch's rows of this worker and updates the model."""

    def __init__(
        self,
        spread: SpreadModel,
        optimizers: Sequence[torch.optim.Optimizer],
        objective: Objective,
        training: Training,
        *,
        seed: int,
        reference: Reference | None = None,
    ) -> None:
        self.spread, self.reference = spread, reference
        self.optimizers = optimizers
        self.objective = objective
        self.plan, self.world = spread.plan, spread.mesh.world
        self.gradient_clip = training.gradient_clip
        self.draws = bool(training.dropout or training.neftune_alpha)
        if self.draws:
            for part in spread.parts:
                assert isinstance(part, Decoder)  # the planner refuses it for other models
                part.set_dropout(training.dropout)
                part.set_embedding_noise(training.neftune_alpha)
        self.seed = seed
        self.routers = Routers.of(spread, training)
        self.loss_scale = LossScale(spread.plan.precision)
        self.parameters = spread.trained_parameters()
        # Called with whole gradients in place, before they are clipped.
        self.gradients_ready: Callable[[], None] | None = None

    def __call__(
        self,
        batch: Batch,
        learning_rate: float,
        first_row: int,
        stop_requested: bool = False,
        *,
        index: int = 0,
    ) -> StepStats:
        """Train on `batch`, this worker's rows, the first of which is `first_row` of the global.

        `index` numbers the step, from 0.
        """
        # One reduction tells every worker three things: how much the global batch weighs, which
        # batch it is, and whether somebody was asked to stop. Workers that share rows say it once.
        own, terms = self.objective.weights(batch), self.objective.terms
        mine = [*(own[name] for name in terms), ordered_hash(batch, first_row)]
        if not counts_rows(self.spread):
            mine = [0] * len(mine)
        shared = self.world.sum(torch.tensor([*mine, int(stop_requested)])).tolist()
        *found, batch_hash, stops = shared
        weights = dict(zip(terms, found, strict=True))
        if weights["targets"] == 0:
            raise UserError(
                "a batch holds no target to train on: every position of it is masked or padding",
                fix="look at it with `trainwright data RECIPE`",
            )

        results = self._accumulate(batch, weights, first_row, index)
        loss, figures = self._mean(results, weights)

        if self.gradients_ready is not None:
            self.gradients_ready()
        norm = self.spread.gradient_norm() / self.loss_scale.value
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
        router = self.routers.after_step(skipped) if self.routers is not None else {}

        stats = StepStats(
            loss=loss,
            gradient_norm=norm.item(),
            learning_rate=learning_rate,
            targets=weights["targets"],
            batch_hash=f"{batch_hash % 2**64:016x}",
            skipped=skipped,
            stop_requested=stops > 0,
            router=router,
            figures=figures,
        )
        self._refuse_broken_numbers(stats, results, batch)
        return stats

    def _accumulate(
        self, batch: Batch, weights: Mapping[str, int], first_row: int, index: int
    ) -> list[tuple[Sums, Sums]]:
        """Gradients of all micro-batches, whole; their loss sums and figures, detached."""
        rows = self.plan.micro_batch
        keys = (self.seed, index, first_row) if self.draws else None
        micro_batches = [
            to_tensors(batch, start, start + rows, self.spread, keys)
            for start in range(0, len(batch.input_ids), rows)
        ]
        if self.reference is not None:
            self.reference.attach(self.objective, self.spread, micro_batches)
        # A sum without a weight is zero, as where no row has what it counts.
        scales = {name: self.loss_scale.value / max(1, each) for name, each in weights.items()}
        if self.routers is not None:
            self.routers.before_step(scales["targets"])
        results = train_micro_batches(self.spread, self.objective, micro_batches, scales)
        self.spread.finish_gradients()
        return results

    def _mean(
        self, results: Sequence[tuple[Sums, Sums]], weights: Mapping[str, int]
    ) -> tuple[float, dict[str, float]]:
        """The loss and the figures over all workers' micro-batches."""
        names = [*weights, *self.objective.figures]
        total = torch.zeros(len(names), dtype=torch.float64, device=self.world.device)
        if counts_losses(self.spread):
            for sums, figures in results:
                for name, each in (sums | figures).items():
                    total[names.index(name)] += each
        sums_of = dict(zip(names, self.world.sum(total).tolist(), strict=True))
        first = max(1, weights[self.objective.terms[0]])
        loss = sum(sums_of[name] / max(1, weight) for name, weight in weights.items())
        return loss, {name: sums_of[name] / first for name in self.objective.figures}

    def _refuse_broken_numbers(
        self, stats: StepStats, results: Sequence[tuple[Sums, Sums]], batch: Batch
    ) -> None:
        """Stop on NaN or Inf, naming the documents; nothing has been saved since the update."""
        broken_loss = stats.loss - stats.loss != 0
        broken_norm = stats.gradient_norm - stats.gradient_norm != 0 and not stats.skipped
        if not (broken_loss or broken_norm or self.loss_scale.exhausted):
            return
        suspects: list[str] = []
        for index, (sums, _) in enumerate(results):
            if not all(torch.isfinite(each) for each in sums.values()):
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


def ordered_hash(batch: Batch, first_row: int) -> int:
    """A number that, summed over the workers, identifies the rows of a batch and their order."""
    total = 0
    for row, value in enumerate(batch.row_hashes(), start=first_row):
        total += value * (2 * row + 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total
