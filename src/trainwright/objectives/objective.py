"""What every objective is: named sums of losses, and the weights that they are divided by.

A loss over a global batch is Σ sum / weight over the names, such as "targets" (trained tokens) or
"pairs". An objective gives the sums of a micro-batch on one worker; the trainer sums them over
micro-batches and workers and alone divides. Accumulation, packing and masking are then exact by
construction, for sums of several means as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from trainwright.data.batches import Batch

Sums = dict[str, Tensor]  # scalars in fp32, by name
# A micro-batch: tensors or None by name (`training.micro_batches.to_tensors`), and what another
# model made of it.
Tensors = Mapping[str, Any]


class Objective(Protocol):
    """Something to optimise."""

    @property
    def needs_reference(self) -> bool:
        """Whether micro-batches must hold what another model makes of them: "reference", the
        reference's scores of each sequence, or "teacher".
        """

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the weights, "targets" among them; the first also divides the figures."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what is reported beside the loss."""

    def weights(self, batch: Batch) -> dict[str, int]:
        """What the named sums of these rows are divided by; "targets" are the trained tokens."""

    def __call__(self, model: nn.Module, batch: Tensors) -> tuple[Sums, Sums]:
        """The micro-batch's loss sums by weight, and figures to report, sums without gradients.

        `model` is called once, with `head=`: what the head function returns comes back from the
        last stage of a pipeline, and nothing of use from the others.
        """


def call(model: nn.Module, batch: Tensors, head: Any) -> Any:
    """The model's forward on a micro-batch, with what there is of it."""
    keys = batch.get("token_keys")
    return model(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
        head=head,
        **({} if keys is None else {"token_keys": keys}),
    )
