"""Next-token prediction: the sum of −log p(target) over all trained positions.

An objective returns a sum and leaves the division to the trainer, which divides by the weight of
the whole global batch: accumulation, packing and masking are then exact by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.kernels.cross_entropy import IGNORED, linear_cross_entropy


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """(loss sum in fp32, number of trained targets) of a micro-batch, both scalars on the device.

    `batch` holds `input_ids`, `labels` (already shifted, -100 = not trained) and `position_ids`
    [rows, sequence], and `segment_ids` of the same shape or None; `token_keys`, if any, are for
    the model's dropout. The loss is taken inside the
    model's forward, where a sharded head is whole.
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

    keys = batch.get("token_keys")
    loss = model(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
        head=loss_of,
        **({} if keys is None else {"token_keys": keys}),
    )
    return loss, torch.count_nonzero(labels != IGNORED)
