"""Causal attention inside documents, with windows and soft caps: the fastest correct path.

`attention_mask` decides once per forward pass what may see what; `attention` runs once per layer.
A plain causal row needs no mask at all; see `attention_mask` for the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.kernels.cpu_attention import blocked_attention, is_faster, takes

try:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
except ImportError:  # a torch without it: masks are plain tensors everywhere
    BlockMask = None  # type: ignore[assignment,misc]

Mask = Any  # a boolean tensor [batch or 1, 1, queries, keys], or a BlockMask


def attention_mask(
    segments: Tensor | None,
    *,
    queries: int,
    keys: int,
    window: int | None = None,
    softcap: float | None = None,
    device: torch.device,
) -> Mask | None:
    """What the last `queries` of a row's `keys` slots may see; None where `attention` knows.

    A slot sees itself and earlier slots of the same segment, the last `window` of them if a
    window is given. segments [batch, keys] are document numbers, None where every row is one
    document. Padding (-1) is a segment like any other: it sees padding, so that no row of the
    softmax is empty, and no document sees it.
    """
    if window is not None and window >= keys:
        window = None
    plain = segments is None and window is None
    if plain and (queries == 1 or (queries == keys and softcap is None)):
        return None
    if device.type == "cuda" and BlockMask is not None and queries == keys:
        return _block_mask(segments, keys, window, device)
    # On CPU (bf16, batch 16, sequences of 256 and 512, forward and backward) a boolean mask costs
    # scaled_dot_product_attention 3-7 % over is_causal, an additive one up to 13 %; a call for
    # each document of 100 tokens takes four times as long. So: one mask, made once for all layers.
    slots = torch.arange(keys, device=device)
    rows, columns = slots[keys - queries :, None], slots[None, :]
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    if segments is None:
        return seen[None, None]
    same = segments[:, keys - queries :, None] == segments[:, None, :]
    return (same & seen)[:, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, with scores z bent to softcap · tanh(z / softcap) if given.

    q [batch, heads, queries, head_dim], k and v [batch, kv_heads, keys, head_dim], each key-value
    head serving heads / kv_heads query heads in a row; v may have a head_dim of its own. `mask`
    comes from `attention_mask`; without one the queries are all slots in causal order, or the last
    slot alone. Returns [batch, heads, queries, v's head_dim].
    """
    grouped = q.shape[1] != k.shape[1]
    if BlockMask is not None and isinstance(mask, BlockMask):
        return _flex()(
            q,
            k,
            v,
            score_mod=_bend(softcap) if softcap is not None else None,
            block_mask=mask,
            scale=scale,
            enable_gqa=grouped,
        )
    if takes(q, k, v) and (softcap is not None or is_faster(q, mask)):
        return blocked_attention(q, k, v, mask=mask, scale=scale, softcap=softcap)
    if softcap is not None:
        return _capped_attention(q, k, v, mask, scale, softcap)
    if grouped and q.device.type == "cuda" and mask is not None:
        # CUDA's masked kernels know no grouped heads; SDPA would fall back to plain arithmetic.
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        grouped = False
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`attention` under `attention_mask`, token by token in plain arithmetic.

    Shapes as there; segments [batch, keys]. Slow; for tests.
    """
    queries, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    result = q.new_zeros(*q.shape[:3], v.shape[3])
    for row in range(q.shape[0]):
        for query in range(queries):
            slot = keys - queries + query
            visible = [
                key
                for key in range(slot + 1)
                if (segments is None or segments[row, key] == segments[row, slot])
                and (window is None or slot - key < window)
            ]
            for head in range(q.shape[1]):
                scores = scale * (k[row, head // group, visible] @ q[row, head, query])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores, 0)
                result[row, head, query] = weights @ v[row, head // group, visible]
    return result


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Soft-capped attention in plain operations, for devices whose kernels cannot bend scores."""
    batch, heads, queries, dim = q.shape
    q = q.reshape(batch, k.shape[1], -1, queries, dim)
    scores = (q * scale) @ k.unsqueeze(2).transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = softcap * torch.tanh(scores.to(wide) / softcap)
    if mask is None and queries > 1:
        mask = attention_mask(None, queries=queries, keys=queries, softcap=softcap, device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return (weights @ v.unsqueeze(2)).reshape(batch, heads, queries, v.shape[3])


def _block_mask(
    segments: Tensor | None, keys: int, window: int | None, device: torch.device
) -> Mask:
    """`attention_mask` for flex attention, which skips blocks that nothing sees."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        if segments is not None:
            seen = seen & (segments[batch, query] == segments[batch, key])
        return seen

    batch = None if segments is None else segments.shape[0]
    return create_block_mask(visible, batch, None, keys, keys, device=str(device))


def slotted_block_mask(
    query_slots: Tensor, key_slots: Tensor, segments: Tensor | None, window: int | None
) -> Mask | None:
    """`attention_mask` for flex attention, of queries and keys in any slots of their rows.

    Slots int64 [queries] and [keys]; segments [batch, sequence] are whole rows'. None where this
    torch has no flex attention.
    """
    if BlockMask is None:
        return None

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, behind = query_slots[query], key_slots[key]
        seen = behind <= at
        if window is not None:
            seen = seen & (behind > at - window)
        if segments is not None:
            seen = seen & (segments[batch, at] == segments[batch, behind])
        return seen

    rows = None if segments is None else segments.shape[0]
    sizes, device = (len(query_slots), len(key_slots)), str(query_slots.device)
    return create_block_mask(visible, rows, None, *sizes, device=device)


def _bend(softcap: float) -> Callable[..., Tensor]:
    def bend(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bend


def _flex() -> Callable[..., Any]:
    """Flex attention is a fused kernel only when compiled; plain, it writes out every score.

    Inside a block that is being compiled it is compiled with the block.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return flex_attention
    return _compiled_flex()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)
