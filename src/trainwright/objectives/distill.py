"""Distillation: a student's next-token distributions drawn towards a teacher's.

The loss is the generalised Jensen-Shannon divergence (`kernels.linear_divergence` has its formula)
of each trained token, perhaps with the cross entropy of the token itself. The teacher's last hidden
states are taken before a step's gradients; both heads are multiplied out in the student's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainwright.data.batches import IGNORED, Batch
from trainwright.kernels.linear_divergence import linear_divergence
from trainwright.objectives.objective import Sums, Tensors, call


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher makes of a micro-batch: hidden [trained tokens, its hidden], and its head."""

    hidden: Tensor
    head: Any  # as `kernels.linear_divergence.Head`


def teacher_output(
    model: nn.Module, batch: Tensors, keep: Callable[[Any], Any] = lambda head: head
) -> TeacherOutput:
    """The teacher's side of a micro-batch, which holds what `next_token_loss` takes.

    `keep` is given the head within the model's forward, and returns what is left of it after.
    """
    places = _trained(batch)

    def kept(hidden: Tensor, head: Any) -> TeacherOutput:
        return TeacherOutput(hidden.flatten(0, 1).index_select(0, places), keep(head))

    output: TeacherOutput = call(model, batch, kept)
    return output


@dataclass(frozen=True)
class Distill:
    """(1 − mix) · divergence + mix · cross entropy, the mean over all trained tokens.

    beta 0 is KL(teacher‖student), 1 KL(student‖teacher); `temperature` divides the logits of both
    (Agarwal et al. 2024, arXiv:2306.13649). The batch holds "teacher", a `TeacherOutput`.
    """

    beta: float = 0.5
    temperature: float = 1.0
    mix: float = 0.0
    needs_reference: bool = True
    terms: tuple[str, ...] = ("targets",)
    figures: tuple[str, ...] = ("divergence", "cross_entropy")

    def weights(self, batch: Batch) -> dict[str, int]:
        """Trained targets."""
        return {"targets": batch.weight}

    def __call__(self, model: nn.Module, batch: Tensors) -> tuple[Sums, Sums]:
        """The loss sum, and the sums of its two parts."""
        places = _trained(batch)

        def loss_of(hidden: Tensor, head: Any) -> tuple[Sums, Sums]:
            # Only where the head is: the other stages of a pipeline have nothing of the teacher's.
            teacher: TeacherOutput = batch["teacher"]
            found = linear_divergence(
                hidden.flatten(0, 1).index_select(0, places),
                head,
                teacher.hidden,
                teacher.head,
                batch["labels"].flatten().index_select(0, places),
                beta=self.beta,
                temperature=self.temperature,
                mix=self.mix,
            )
            figures = {"divergence": found.divergence, "cross_entropy": found.cross_entropy}
            return {"targets": found.loss}, figures

        result: tuple[Sums, Sums] = call(model, batch, loss_of)
        return result


def _trained(batch: Tensors) -> Tensor:
    """Which of the own tokens are trained, numbered through all rows."""
    return (batch["labels"].flatten() != IGNORED).nonzero().squeeze(-1)
