"""Attention for training on a CPU, in blocks of queries that stay in its cache.

PyTorch's fused CPU kernel makes its products itself, slowly where the CPU has no matrix tiles
(AMX), and it reads every key where there is a mask. Here both products are the library's batched
ones, and a block of queries reads only from the first key that any of them sees. Measured on two
cores of an AMD EPYC (AVX-512, bf16, 8 heads of 64, sequence 512, forward and backward) against
the fused kernel: 71 % of its time on plain causal rows, 43 % on packed documents of 100 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Queries a block, and heads (of whole rows) at once: their scores stay in the cache.
QUERIES, HEADS = 64, 16
# Keys begin at multiples of so many: oneDNN compiles a kernel for every shape, and keeps it. Where
# they began at any document, a step of packed rows left 12 MB of kernels among the activations.
GRAIN = 32
LONGEST_CAUSAL = 1024  # where nothing but the causal half can be left out, the kernels draw here
# AVX-512 without tiles; on other CPUs PyTorch's kernel keeps the benefit of the doubt.
MEASURED_KIND = (
    torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and not getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `blocked_attention` is made for these tensors."""
    fits = q.shape[2] == k.shape[2] > 1 and q.dtype == k.dtype == v.dtype
    return fits and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)


def is_faster(q: Tensor, mask: Tensor | None) -> bool:
    """Whether, where it `takes` the tensors, it beats PyTorch's kernel on this CPU."""
    return MEASURED_KIND and (mask is not None or q.shape[2] <= LONGEST_CAUSAL)


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`kernels.attention.attention` for as many keys as queries, in fp32 or bf16.

    mask is boolean, [batch or 1, 1, tokens, tokens], every token seeing at least itself and no
    later one; None is causal. Scores, softmax and its gradient are fp32. Nothing but q, k and v is
    kept for the backward pass, which computes the weights again. torch.compile sees one operation.
    """
    return _attend(q, k, v, mask, scale, softcap)


@torch.library.custom_op("trainwright::blocked_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    result = _empty_like_result(q, k, v, mask, scale, softcap)
    with torch.autocast("cpu", enabled=False):
        for group in _groups(q, k, v, mask, scale, softcap):
            for block, seen, weights, _ in group.blocks():
                mixed = torch.bmm(weights.to(v.dtype), group.values[:, seen])
                result[group.rows, :, block] = mixed.unflatten(0, (-1, q.shape[1]))
    return result


@torch.library.custom_op("trainwright::blocked_attention_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    for_q, for_k, for_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with torch.autocast("cpu", enabled=False):
        for group in _groups(q, k, v, mask, scale, softcap):
            rows, queries = group.rows, group.wide_queries.to(q.dtype)
            upstream = gradient[rows].flatten(0, 1)
            key_sums = torch.zeros_like(group.wide_keys)
            value_sums = torch.zeros_like(group.values, dtype=torch.float32)
            for block, seen, weights, slope in group.blocks():
                bent = torch.bmm(upstream[:, block], group.values[:, seen].transpose(1, 2)).float()
                bent = torch._softmax_backward_data(bent, weights, -1, torch.float32)
                if slope is not None:
                    bent *= slope
                bent, weights = bent.to(q.dtype), weights.to(q.dtype)
                mixed = torch.bmm(bent, group.keys[:, seen]).mul_(scale)
                for_q[rows, :, block] = mixed.unflatten(0, (-1, q.shape[1]))
                key_sums[:, seen] += torch.bmm(bent.transpose(1, 2), queries[:, block])
                value_sums[:, seen] += torch.bmm(weights.transpose(1, 2), upstream[:, block])
            # A key-value head gathers what the query heads that it serves send back.
            for target, sums in ((for_k, key_sums), (for_v, value_sums)):
                target[rows] = sums.unflatten(0, (-1, k.shape[1], q.shape[1] // k.shape[1])).sum(2)
    return for_q, for_k, for_v


@dataclass(frozen=True)
class _Group:
    """A few rows of the batch, as [rows · heads, tokens, channels]."""

    rows: slice
    wide_queries: Tensor  # fp32, times the scale
    wide_keys: Tensor  # fp32
    keys: Tensor
    values: Tensor
    mask: Tensor | None  # [rows or 1, 1, tokens, tokens]
    softcap: float | None

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Each block of queries, the keys from the first to the last that any of it sees, the
        attention weights [rows · heads, block, seen] in fp32, and the soft cap's slope there.
        """
        tokens = self.wide_queries.shape[1]
        for start in range(0, tokens, QUERIES):
            stop, first = min(start + QUERIES, tokens), 0
            if self.mask is None:
                mask = torch.ones(1, 1, stop - start, stop - start, dtype=torch.bool).tril_()
            else:
                mask = self.mask[:, :, start:stop, :stop]
                first = int(mask.flatten(0, 2).any(0).to(torch.uint8).argmax()) // GRAIN * GRAIN
                mask = mask[..., first:]
            block, seen = slice(start, stop), slice(first, stop)
            scores = torch.bmm(self.wide_queries[:, block], self.wide_keys[:, seen].transpose(1, 2))
            slope = None
            if self.softcap is not None:
                scores = torch.tanh(scores / self.softcap)
                slope = 1 - scores.square()
                scores = scores * self.softcap
            # A causal block hides nothing but part of its last, square end.
            end = scores[..., -mask.shape[-1] :].unflatten(0, (mask.shape[0], -1))
            end.masked_fill_(~mask, -torch.inf)
            yield block, seen, torch.softmax(scores, -1), slope


def _groups(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Iterator[_Group]:
    rows_at_once, serves = max(1, HEADS // q.shape[1]), q.shape[1] // k.shape[1]
    for start in range(0, q.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        queries = q[rows].flatten(0, 1).float() * scale
        keys, values = k[rows], v[rows]
        if serves > 1:
            keys, values = keys.repeat_interleave(serves, 1), values.repeat_interleave(serves, 1)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        part = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        yield _Group(rows, queries, keys.float(), keys, values, part, softcap)


@_attend.register_fake
def _empty_like_result(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    # Laid out token by token, as the projection after it reads.
    batch, heads, tokens, _ = q.shape
    return v.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)


@_attend_backward.register_fake
def _empty_like_gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.softcap)
    return *gradients, None, None, None


_attend.register_autograd(_differentiate, setup_context=_remember)
