"""The output head and the cross entropy in one operation, so that full logits are never held.

Logits exist for a chunk of tokens at a time; their gradient is taken in the forward pass, while
they are at hand, and only the gradients of the hidden states and of the head's weight are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a position that is not trained

# A chunk's logits take about this many elements, or as many as the hidden states if those are
# more: large enough that adding the chunks' weight gradients together costs little.
CHUNK_ELEMENTS = 1 << 24


def cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What `linear_cross_entropy` computes, with all logits at once; its plain reference."""
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of −log softmax(scale · (hidden · weightᵀ + bias))[label] over labels that are not -100.

    hidden [tokens, hidden], weight [vocabulary, hidden], labels [tokens], bias [vocabulary];
    `softcap` c bends logits z into c·tanh(z/c). Products run in autocast's dtype where autocast is
    on, the softmax and the sums in fp32. Returns a scalar in fp32.

    With a `group` the vocabulary is cut evenly over its workers in rank order: `weight` and `bias`
    are a worker's rows, hidden and labels are equal on all. No worker ever has full logits: three
    numbers a token are reduced. The loss is then equal on all; the gradient of `hidden` is what
    the own rows contribute, to be summed by whoever made the hidden states whole.
    """
    if chunk_rows is None:
        budget = max(CHUNK_ELEMENTS, hidden.numel())
        chunk_rows = max(64, budget // weight.shape[0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wants = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, scale, softcap, group, chunk_rows, dtype, wants
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        group: dist.ProcessGroup | None,
        chunk_rows: int,
        dtype: torch.dtype,
        wants: bool,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = (
            wants and want for want in ctx.needs_input_grad[:3]
        )
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient: Tensor | None = None
        bias_gradient = matrix.new_zeros(len(matrix), dtype=torch.float32) if wants_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)

        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_rows):
                part = slice(start, start + chunk_rows)
                inputs = hidden[part].to(dtype)
                loss, gradient = _chunk(
                    F.linear(inputs, matrix, offset), labels[part], scale, softcap, group
                )
                total += loss
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(0)
                narrow = gradient.to(dtype)
                if hidden_gradient is not None:
                    hidden_gradient[part] = narrow @ matrix
                if wants_weight:
                    product = narrow.t() @ inputs
                    if weight_gradient is None:
                        weight_gradient = product.float()
                    else:
                        weight_gradient += product
        if wants_weight and weight_gradient is None:  # no tokens at all
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # New tensors, not in place: a second backward through a kept graph must see the originals.
        return (
            None if hidden is None else (hidden * gradient).to(hidden.dtype),
            None if weight is None else (weight * gradient).to(weight_dtype),
            None if bias is None else (bias * gradient).to(bias_dtype),
            *[None] * 7,
        )


def _chunk(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Loss sum of a chunk and its gradient with respect to the raw logits, both fp32."""
    bent = None
    if scale != 1.0 or softcap is not None:
        logits = logits.float() * scale
        if softcap is not None:
            bent = torch.tanh(logits / softcap)
            logits = softcap * bent
    trained = labels != IGNORED
    targets = labels.where(trained, 0).unsqueeze(-1)
    if group is None:
        losses, gradient = _entropy(logits, targets)
    else:
        losses, gradient = _shared_entropy(logits, targets, group)
    loss = losses.where(trained, 0.0).sum()
    if bent is not None:
        gradient *= 1.0 - bent * bent
    if scale != 1.0:
        gradient *= scale
    if trained.is_cuda or not bool(trained.all()):  # on a GPU, looking would mean waiting
        gradient *= trained.unsqueeze(-1)
    return loss, gradient


def _entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss, and its gradient; logits [tokens, vocabulary], targets [tokens, 1]."""
    gradient, log_sum = _softmax(logits)
    losses = (log_sum - logits.gather(-1, targets).float()).squeeze(-1)
    gradient.scatter_add_(-1, targets, gradient.new_full(targets.shape, -1.0))
    return losses, gradient


def _shared_entropy(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """`_entropy` where the vocabulary is cut over `group`: the gradient of the own rows."""
    rows = logits.shape[-1]
    gradient, log_sum = _softmax(logits)
    largest = log_sum.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    own = targets - dist.get_rank(group) * rows
    here = (own >= 0) & (own < rows)
    own = own.clamp(0, rows - 1)
    target = logits.gather(-1, own).float() * here
    sums = torch.cat([(log_sum - largest).exp(), target], -1)
    dist.all_reduce(sums, group=group)
    total = largest + sums[:, :1].log()
    gradient *= (log_sum - total).exp()
    gradient.scatter_add_(-1, own, -here.to(gradient.dtype))
    return (total - sums[:, 1:]).squeeze(-1), gradient


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of logits [tokens, vocabulary], and the log of its sum [tokens, 1], in fp32."""
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    # One exponential a logit: log-sum-exp follows from the largest probability, which is at least
    # 1/vocabulary and so never underflows, where the target's own may.
    largest, place = probabilities.max(-1, keepdim=True)
    return probabilities, logits.gather(-1, place).float() - largest.log()
