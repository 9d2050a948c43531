"""Attention for training on CPUs without matrix tiles (AMX), in blocks that stay in the cache.

PyTorch's fused CPU attention spends its time in small products of its own there; the same work as
batched matrix products over blocks of queries takes about 60 % of the time at sequences up to
1,024, and less where documents are short: a block begins at the first key that any of it sees.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

# Queries a block and rows of the batch at once: scores of about half a megabyte at 512 keys.
QUERIES, ROWS = 64, 2
LONGEST = 1024  # beyond this PyTorch's kernel is as fast


@functools.cache
def pays() -> bool:
    """Whether this CPU is of the kind for which the blocks were measured to be faster."""
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not has_tiles


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `kernels.attention.attention` for as many keys as queries, fp32 or bf16.

    Scores, softmax and its gradient are fp32. Nothing but q, k and v is kept for the backward
    pass, which computes the weights again. One opaque operation to torch.compile.
    """
    return _forward(q, k, v, mask, scale)


@torch.library.custom_op("trainwright::blocked_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    result = _empty_result(q, k, v, mask, scale)
    with torch.autocast("cpu", enabled=False):
        for rows in _row_groups(q):
            queries, keys, values = _flat(q[rows]), _heads(k[rows], q), _heads(v[rows], q)
            wide = queries.float() * scale, keys.float()
            for block, seen in _blocks(q, mask, rows):
                weights = _weights(*wide, mask, rows, block, seen).to(v.dtype)
                mixed = torch.bmm(weights, values[:, seen])
                result[rows, :, block] = mixed.unflatten(0, (-1, q.shape[1]))
    return result


@torch.library.custom_op("trainwright::blocked_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    for_q, for_k, for_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with torch.autocast("cpu", enabled=False):
        for rows in _row_groups(q):
            queries, keys, values = _flat(q[rows]), _heads(k[rows], q), _heads(v[rows], q)
            wide = queries.float() * scale, keys.float()
            queries = wide[0].to(q.dtype)
            upstream = _flat(gradient[rows])
            key_sums = torch.zeros_like(keys, dtype=torch.float32)
            value_sums = torch.zeros_like(values, dtype=torch.float32)
            for block, seen in _blocks(q, mask, rows):
                weights = _weights(*wide, mask, rows, block, seen)
                along = torch.bmm(upstream[:, block], values[:, seen].transpose(1, 2))
                bent = torch._softmax_backward_data(along.float(), weights, -1, torch.float32)
                bent, weights = bent.to(q.dtype), weights.to(q.dtype)
                mixed = torch.bmm(bent, keys[:, seen]).mul_(scale)
                for_q[rows, :, block] = mixed.unflatten(0, (-1, q.shape[1]))
                key_sums[:, seen] += torch.bmm(bent.transpose(1, 2), queries[:, block])
                value_sums[:, seen] += torch.bmm(weights.transpose(1, 2), upstream[:, block])
            for target, sums in ((for_k, key_sums), (for_v, value_sums)):
                group = sums.view(len(target[rows]), k.shape[1], -1, *sums.shape[1:])
                target[rows] = group.sum(2)
    return for_q, for_k, for_v


def _row_groups(q: Tensor) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, q.shape[0], ROWS)]


def _flat(x: Tensor) -> Tensor:
    """[rows, heads, tokens, channels] → [rows · heads, tokens, channels]."""
    return x.flatten(0, 1)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, flat, once for every query head."""
    return _flat(x.repeat_interleave(q.shape[1] // x.shape[1], 1))


def _blocks(q: Tensor, mask: Tensor | None, rows: slice) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that any query of a block may see."""
    found = []
    for start in range(0, q.shape[2], QUERIES):
        stop, first = min(start + QUERIES, q.shape[2]), 0
        if mask is not None:
            part = mask[rows] if mask.shape[0] > 1 else mask
            first = int(part[:, 0, start:stop].any(dim=1).any(dim=0).to(torch.uint8).argmax())
        found.append((slice(start, stop), slice(first, stop)))
    return found


def _weights(
    queries: Tensor, keys: Tensor, mask: Tensor | None, rows: slice, block: slice, seen: slice
) -> Tensor:
    """Attention weights [rows · heads, block, seen] in fp32."""
    scores = torch.bmm(queries[:, block], keys[:, seen].transpose(1, 2))
    if mask is None:
        size = block.stop - block.start
        later = torch.ones(size, size, dtype=torch.bool).triu_(1)
        scores[:, :, block.start - seen.start :].masked_fill_(later, -torch.inf)
    else:
        part = mask[rows] if mask.shape[0] > 1 else mask
        hidden = ~part[:, :, block, seen]
        scores.view(len(part) if mask.shape[0] > 1 else 1, -1, *scores.shape[1:]).masked_fill_(
            hidden, -torch.inf
        )
    return torch.softmax(scores, -1)


@_forward.register_fake
def _empty_result(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # Laid out token by token, as the projection after it reads.
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)


@_backward.register_fake
def _empty_gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
