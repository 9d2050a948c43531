"""Cross entropy of the next token: of all of a text, or of the answers that are trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trainwright.data.batches import Batch
from trainwright.kernels.cross_entropy import linear_cross_entropy
from trainwright.objectives.objective import Sums, Tensors, call


class NextToken:
    """The mean of −log p(target) over all trained positions."""

    needs_reference = False
    terms = ("targets",)
    figures: tuple[str, ...] = ()

    def weights(self, batch: Batch) -> dict[str, int]:
        """Trained targets."""
        return {"targets": batch.weight}

    def __call__(self, model: nn.Module, batch: Tensors) -> tuple[Sums, Sums]:
        """The loss sum in fp32, and no figures."""
        return {"targets": next_token_loss(model, batch)}, {}


def next_token_loss(model: nn.Module, batch: Tensors) -> Tensor:
    """The sum of −log p(target) over a micro-batch, a scalar in fp32 on the device.

    `batch` holds `input_ids`, `labels` (already shifted, -100 = not trained) and `position_ids`
    [rows, sequence], and `segment_ids` of the same shape or None; `token_keys`, if any, are for
    the model's dropout. The loss is taken inside the model's forward, where a sharded head is
    whole.
    """
    labels = batch["labels"]
    assert labels is not None

    def loss_of(hidden: Tensor, head: Any) -> Tensor:
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            labels.flatten(),
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            group=head.group,
        )

    loss: Tensor = call(model, batch, loss_of)
    return loss
