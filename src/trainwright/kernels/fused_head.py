"""What the fused output heads share: a chunk's logits, and the way back from their gradient.

`linear_log_probs` and `linear_divergence` both go through hidden states a chunk of tokens at a
time, so that logits exist for one chunk only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainwright.kernels.grouped import rounded


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which softmaxes and sums run: fp32, or fp64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's type where autocast is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunks(rows: int, chunk_rows: int) -> list[slice]:
    """Slices of `chunk_rows` rows, the last perhaps shorter; none where there are no rows."""
    return [slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows)]


def head_logits(
    hidden: Tensor,
    part: slice,
    matrix: Tensor,
    offset: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | float | None]:
    """Logits of the rows `part` of hidden, and their derivative by the product's own values.

    The derivative is None for 1. Logits are in the matrix's type where neither scale nor softcap
    asks for more, else wide.
    """
    count = part.stop - part.start
    rows = rounded(hidden[part].to(matrix.dtype), slice(0, count))
    logits = F.linear(rows, matrix, offset)[:count]
    if scale == 1.0 and softcap is None:
        return logits, None
    logits = logits.to(wide(matrix.dtype)) * scale
    if softcap is None:
        return logits, scale
    bent = torch.tanh(logits / softcap)
    return softcap * bent, scale * (1.0 - bent * bent)


def own_targets(
    labels: Tensor, rows: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The labels' places among the own `rows` of the vocabulary, and whether they lie there.

    Both [tokens, 1], of labels [tokens] that are tokens all; a place elsewhere is some own row
    instead. With a `group` the vocabulary is cut over its workers in rank order.
    """
    own = labels.unsqueeze(-1)
    if group is None:
        return own, torch.ones_like(own, dtype=torch.bool)
    own = own - dist.get_rank(group) * rows
    return own.clamp(0, rows - 1), (own >= 0) & (own < rows)


def push(
    gradient: Tensor,
    hidden: Tensor,
    part: slice,
    matrix: Tensor,
    for_hidden: Tensor | None,
    for_weight: Tensor | None,
    for_bias: Tensor | None,
) -> None:
    """Add what a gradient of the products [rows of `part`, vocabulary] means to each input's."""
    narrow = gradient.to(matrix.dtype)
    count = len(narrow)
    narrow = rounded(narrow, slice(0, count))
    if for_hidden is not None:
        for_hidden[part] = (narrow @ matrix)[:count].to(for_hidden.dtype)
    if for_weight is not None:
        for_weight += narrow.t() @ rounded(hidden[part].to(matrix.dtype), slice(0, count))
    if for_bias is not None:
        for_bias += gradient.sum(0)
