"""The teacher of a distillation: a second, frozen model, spread over the same workers.

Its last hidden states of a step's trained tokens are taken before the step's gradients and kept
until the loss, where its head is multiplied out beside the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from trainwright.models.output_head import OutputHead
from trainwright.objectives.distill import TeacherOutput, teacher_output
from trainwright.objectives.objective import Objective, Tensors
from trainwright.parallel.spread import SpreadModel
from trainwright.training.micro_batches import score_micro_batches
from trainwright.training.reference import MicroBatch, give_back


@dataclass(frozen=True)
class Teacher:
    """A spread model to learn from."""

    spread: SpreadModel

    def attach(
        self, objective: Objective, policy: SpreadModel, micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Put "teacher" into each micro-batch; None but on the last stage. Collective."""
        heads: list[OutputHead] = []

        def kept(head: OutputHead) -> OutputHead:
            if not heads:
                heads.append(_copied(head) if self.spread.sharded else head)
            return heads[0]

        def output(model: nn.Module, batch: Tensors) -> TeacherOutput:
            return teacher_output(model, batch, kept)

        still = [{**each, "token_keys": None} for each in micro_batches]
        outputs = score_micro_batches(self.spread, output, still)
        for micro_batch, found in zip(micro_batches, outputs, strict=True):
            micro_batch["teacher"] = found
        give_back(self.spread)


def _copied(head: OutputHead) -> OutputHead:
    """A head that was gathered, and is there in the forward pass only, as tensors of its own."""

    bias = None if head.bias is None else head.bias.detach().clone()
    return replace(head, weight=head.weight.detach().clone(), bias=bias)
