"""The log-probability of every trained token, from hidden states, without ever holding full logits.

Preference objectives weigh each sequence by a function of its log-probability, so the gradient of a
token is not known before the whole batch has been seen. Unlike `kernels.cross_entropy`, the
backward pass therefore computes each chunk's logits a second time; nothing of their size is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainwright.kernels.cross_entropy import CHUNK_ELEMENTS, IGNORED
from trainwright.kernels.fused_head import (
    chunks,
    head_logits,
    own_targets,
    product_dtype,
    push,
    wide,
)


def log_probs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What `linear_log_probs` computes, with all logits at once; its plain reference."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(wide(logits.dtype)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    trained = labels != IGNORED
    targets = labels.where(trained, 0).unsqueeze(-1)
    return torch.log_softmax(logits, -1).gather(-1, targets).squeeze(-1).where(trained, 0.0)


def linear_log_probs(
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
    """log softmax(scale · (hidden · weightᵀ + bias))[label] for each token, 0 where it is -100.

    hidden [tokens, hidden], weight [vocabulary, hidden], labels [tokens], bias [vocabulary];
    `softcap` c bends logits z into c·tanh(z/c). Only trained tokens are multiplied with the
    weight, about `chunk_rows` of them at a time (by default as many as fit into a fixed budget).
    Products run in autocast's dtype where autocast is on, the rest in fp32 or wider. Returns
    [tokens] in that wide type, with gradients for hidden, weight and bias.

    With a `group` the vocabulary is cut evenly over its workers in rank order: `weight` and `bias`
    are a worker's rows, hidden and labels are equal on all. The result is then equal on all; the
    gradient of `hidden` is what the own rows contribute, to be summed by whoever made the hidden
    states whole.
    """
    if chunk_rows is None:
        chunk_rows = max(64, max(CHUNK_ELEMENTS, hidden.numel()) // weight.shape[0])
    # On a GPU this waits for the device, once a micro-batch: prompts are often most of a
    # preference batch, and their part of the head's work is worth more than the wait.
    places = (labels != IGNORED).nonzero().squeeze(-1)
    dtype = product_dtype(hidden)
    log_probs = _LinearLogProbs.apply(
        hidden.index_select(0, places),
        weight,
        bias,
        labels.index_select(0, places),
        scale,
        softcap,
        group,
        chunk_rows,
        dtype,
    )
    return log_probs.new_zeros(len(labels)).index_copy(0, places, log_probs)


class _LinearLogProbs(torch.autograd.Function):
    """Every label is a token of the vocabulary here: untrained ones are left out before."""

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
    ) -> Tensor:
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        targets, here = own_targets(labels, len(weight), group)
        found, log_sums = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks(len(hidden), chunk_rows):
                logits, _ = head_logits(hidden, part, matrix, offset, scale, softcap)
                kind = wide(logits.dtype)
                if group is None:
                    own = torch.log_softmax(logits, -1, dtype=kind)
                else:
                    own = logits.to(kind)
                    log_sums.append(torch.logsumexp(own, -1, keepdim=True))
                found.append(own.gather(-1, targets[part]))
            values = torch.cat(found) if found else hidden.new_zeros(0, 1, dtype=wide(dtype))
            share = None
            if group is not None:
                local = torch.cat(log_sums) if log_sums else values
                log_sum, target = _shared(local, values * here, group)
                share = (local - log_sum).exp()
                values = target - log_sum
        ctx.save_for_backward(hidden, weight, bias, labels, share)
        ctx.settings = (scale, softcap, group, chunk_rows, dtype)
        return values.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (incoming,) = gradients
        hidden, weight, bias, labels, share = ctx.saved_tensors
        scale, softcap, group, chunk_rows, dtype = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        targets, here = own_targets(labels, len(weight), group)
        for_hidden = torch.empty_like(hidden) if wants_hidden else None
        kind = wide(dtype)
        for_weight = torch.zeros_like(weight, dtype=kind) if wants_weight else None
        for_bias = torch.zeros_like(bias, dtype=kind) if wants_bias else None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for part in chunks(len(hidden), chunk_rows):
                logits, slope = head_logits(hidden, part, matrix, offset, scale, softcap)
                gradient = torch.softmax(logits, -1, dtype=wide(logits.dtype))
                if share is not None:  # of the whole vocabulary's probability
                    gradient *= share[part]
                gradient.scatter_add_(-1, targets[part], -here[part].to(gradient.dtype))
                gradient *= -incoming[part].unsqueeze(-1)
                if slope is not None:
                    gradient *= slope
                push(gradient, hidden, part, matrix, for_hidden, for_weight, for_bias)
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None else for_bias.to(bias.dtype),
            *[None] * 6,
        )


def _shared(log_sum: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of the whole vocabulary: log Σ exp(logit), and the target's logit, both [tokens, 1].

    `log_sum` is over the own rows, `target` is 0 where another worker has the target's row.
    """
    largest = log_sum.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.cat([(log_sum - largest).exp(), target], -1)
    dist.all_reduce(sums, group=group)
    return largest + sums[:, :1].log(), sums[:, 1:]
