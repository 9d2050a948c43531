"""Attention of some tokens of a row over some others, in parts that can be put together.

Context parallelism meets a row's keys a block at a time, in whatever order workers hold them. Each
part comes with the logarithm of its softmax's denominator, by which `merge` weighs parts (online
softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). The
backward pass takes the whole row's denominators, so each block's part of it stands alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.kernels.cpu_attention import GRAIN

# A tile's scores: queries x keys for about so many heads. A few MB, whatever the row's length.
QUERIES, KEYS, HEADS = 64, 1024, 16


@dataclass(frozen=True)
class Sight:
    """Which queries see which keys, by the slots of a row that they stand in.

    A query sees keys of its own segment in its own and earlier slots, in the last `window` of them
    if that is given. Slots are int64 [queries] and [keys]; segments [batch, queries] and
    [batch, keys], None where a row is one document. `pattern` says what is known beforehand: "all"
    is seen, or it is "causal" (the same slots on both sides, ascending, and nothing else to heed).
    """

    query_slots: Tensor
    key_slots: Tensor
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    window: int | None = None
    pattern: str | None = None

    def visible(self, rows: slice, queries: slice, keys: slice) -> Tensor:
        """Boolean [rows or 1, queries, keys] for these rows of the batch."""
        at, behind = self.query_slots[queries, None], self.key_slots[None, keys]
        seen = behind <= at
        if self.window is not None:
            seen &= behind > at - self.window
        if self.query_segments is None or self.key_segments is None:
            return seen.unsqueeze(0)
        of_query = self.query_segments[rows, queries, None]
        return seen & (of_query == self.key_segments[rows, None, keys])

    def tiles(self, rows: slice) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Queries, keys and what they see of each other; None for all, and no tile for nothing."""
        for first in range(0, len(self.query_slots), QUERIES):
            queries = slice(first, min(first + QUERIES, len(self.query_slots)))
            for start in range(0, len(self.key_slots), KEYS):
                keys = slice(start, min(start + KEYS, len(self.key_slots)))
                if self.pattern == "all":
                    yield queries, keys, None
                    continue
                seen = self.visible(rows, queries, keys)
                columns = seen.flatten(0, 1).any(0).nonzero()
                if not len(columns):
                    continue
                # Of few shapes, see GRAIN.
                low = int(columns[0]) // GRAIN * GRAIN
                high = min(-(-(int(columns[-1]) + 1) // GRAIN) * GRAIN, seen.shape[-1])
                seen = seen[..., low:high]
                keys = slice(start + low, start + high)
                yield queries, keys, None if bool(seen.all()) else seen


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over these keys alone, and log Σ exp(score), both at least fp32.

    q [batch, heads, queries, head_dim], k [batch, kv_heads, keys, head_dim], v the same but for its
    own head_dim; scale and softcap as in `kernels.attention.attention`. Returns
    [batch, heads, queries, v's head_dim] and [batch, heads, queries]; a query that sees none of the
    keys has zeros and -inf.
    """
    if _takes_flash(q, k, v, sight, softcap):
        return _flash(q, k, v, sight.pattern == "causal", scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    result = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        for group in _groups(q, k, v, scale, softcap):
            for queries, keys, seen in sight.tiles(group.rows):
                scores, _ = group.scores(queries, keys, seen)
                # A row that sees nothing has no finite peak, and must not become NaN.
                peak = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
                weights = scores.sub_(peak).exp_()
                total = weights.sum(-1, keepdim=True)
                part = torch.bmm(weights.to(v.dtype), group.values[:, keys]).to(wide)
                part = part.div_(total.clamp_min(torch.finfo(wide).tiny))
                place = (group.rows, slice(None), queries)
                result[place], lse[place] = merge(
                    result[place],
                    lse[place],
                    part.unflatten(0, (-1, q.shape[1])),
                    (peak + total.log()).squeeze(-1).unflatten(0, (-1, q.shape[1])),
                )
    return result, lse


def partial_attention_backward(
    gradient: Tensor,
    result: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradients of q, k and v, each at least fp32.

    `result` and `lse` are the whole row's, all parts merged; `gradient` is that of `result`.
    """
    if _takes_flash(q, k, v, sight, softcap):
        return _flash_backward(gradient, result, lse, q, k, v, sight.pattern == "causal", scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    for_q, for_k, for_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    heads, serves = q.shape[1], q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        # The softmax's gradient takes from each score's the mean over what the query saw in all.
        mean = (gradient.to(wide) * result.to(wide)).sum(-1)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        for group in _groups(q, k, v, scale, softcap):
            rows, narrow_queries = group.rows, group.wide_queries.to(q.dtype)
            upstream = gradient[rows].flatten(0, 1).to(v.dtype)
            means, lses = mean[rows].flatten(0, 1), lse[rows].flatten(0, 1)
            key_sums = torch.zeros_like(group.wide_keys)
            value_sums = torch.zeros_like(group.values, dtype=wide)
            for queries, keys, seen in sight.tiles(rows):
                scores, slope = group.scores(queries, keys, seen)
                weights = scores.sub_(lses[:, queries, None]).exp_()
                bent = torch.bmm(upstream[:, queries], group.values[:, keys].transpose(1, 2))
                bent = bent.to(wide).sub_(means[:, queries, None]).mul_(weights)
                if slope is not None:
                    bent *= slope
                bent, weights = bent.to(q.dtype), weights.to(v.dtype)
                mixed = torch.bmm(bent, group.keys[:, keys]).to(wide).mul_(scale)
                for_q[rows, :, queries] += mixed.unflatten(0, (-1, heads))
                key_sums[:, keys] += torch.bmm(bent.transpose(1, 2), narrow_queries[:, queries])
                value_sums[:, keys] += torch.bmm(weights.transpose(1, 2), upstream[:, queries])
            # A key-value head gathers what the query heads that it serves send back.
            for target, sums in ((for_k, key_sums), (for_v, value_sums)):
                target[rows] = sums.unflatten(0, (-1, k.shape[1], serves)).sum(2)
    return for_q, for_k, for_v


def merge(result: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of one softmax's mean as one: over the keys of both, with their joint lse."""
    total = torch.logaddexp(lse, other_lse)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    share, other_share = (lse - finite).exp_(), (other_lse - finite).exp_()
    return result * share.unsqueeze(-1) + other * other_share.unsqueeze(-1), total


def partial_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`partial_attention` in plain arithmetic, every score at once; differentiable."""
    serves = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(serves, 1), v.repeat_interleave(serves, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = sight.visible(slice(None), slice(None), slice(None)).unsqueeze(1)
    weights = scores.exp() * seen
    total = weights.sum(-1)
    return weights @ v / total.clamp_min(1e-300).unsqueeze(-1), total.log()


def slotted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_slots: Tensor,
    key_slots: Tensor,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`kernels.attention.attention` of tokens in any slots of their rows, in tiles.

    Shapes as in `partial_attention`; who sees whom as in `Sight`. Every query sees some key.
    torch.compile sees one operation.
    """
    result, _ = _slotted(
        q,
        k,
        v,
        query_slots,
        key_slots,
        query_segments,
        key_segments,
        window,
        scale,
        softcap,
    )
    return result


@torch.library.custom_op("trainwright::slotted_attention", mutates_args=())
def _slotted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_slots: Tensor,
    key_slots: Tensor,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    sight = Sight(query_slots, key_slots, query_segments, key_segments, window)
    result, lse = partial_attention(q, k, v, sight, scale=scale, softcap=softcap)
    return laid_out(result, v.dtype), lse


@torch.library.custom_op("trainwright::slotted_attention_backward", mutates_args=())
def _slotted_backward(
    gradient: Tensor,
    result: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_slots: Tensor,
    key_slots: Tensor,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    sight = Sight(query_slots, key_slots, query_segments, key_segments, window)
    gradients = partial_attention_backward(
        gradient, result, lse, q, k, v, sight, scale=scale, softcap=softcap
    )
    for_q, for_k, for_v = (x.to(q.dtype) for x in gradients)
    return for_q, for_k, for_v


def laid_out(result: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, heads, tokens, head_dim], in memory token by token, as the next projection reads."""
    return result.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)


@_slotted.register_fake
def like_result(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp without values, laid out as `laid_out` does it."""
    batch, heads, tokens, _dim = q.shape
    result = v.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    return result, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_slotted_backward.register_fake
def _like_gradients(
    gradient: Tensor, result: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _slotted_backward(gradient, *ctx.saved_tensors, ctx.window, ctx.scale, ctx.softcap)
    return *gradients, *[None] * 7


_slotted.register_autograd(_differentiate, setup_context=_remember)


@dataclass(frozen=True)
class _Group:
    """A few rows of the batch, as [rows · heads, tokens, channels]."""

    rows: slice
    wide_queries: Tensor  # at least fp32, times the scale
    wide_keys: Tensor  # at least fp32
    keys: Tensor
    values: Tensor
    softcap: float | None

    def scores(
        self, queries: slice, keys: slice, seen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [rows · heads, queries, keys], -inf where unseen, and the soft cap's slope."""
        ahead = self.wide_keys[:, keys].transpose(1, 2)
        scores, slope = torch.bmm(self.wide_queries[:, queries], ahead), None
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square()
            scores *= self.softcap
        if seen is not None:
            by_row = scores.unflatten(0, (seen.shape[0], -1))
            by_row.masked_fill_(~seen.unsqueeze(1), -torch.inf)
        return scores, slope


def _groups(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> Iterator[_Group]:
    wide = torch.promote_types(q.dtype, torch.float32)
    rows_at_once, serves = max(1, HEADS // q.shape[1]), q.shape[1] // k.shape[1]
    for start in range(0, q.shape[0], rows_at_once):
        rows = slice(start, min(start + rows_at_once, q.shape[0]))
        queries = q[rows].flatten(0, 1).to(wide) * scale
        keys, values = k[rows], v[rows]
        if serves > 1:
            keys, values = keys.repeat_interleave(serves, 1), values.repeat_interleave(serves, 1)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        yield _Group(rows, queries, keys.to(wide), keys, values, softcap)


# CUDA: PyTorch's flash kernels, which give and take the logarithms, where a pattern is known.


def _takes_flash(q: Tensor, k: Tensor, v: Tensor, sight: Sight, softcap: float | None) -> bool:
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] == v.shape[3] <= 256
    known = sight.pattern is not None and softcap is None
    if not (q.is_cuda and known and fits and q.shape[3] % 8 == 0):
        return False
    return _has_flash(q.device.index)


@functools.cache
def _has_flash(index: int) -> bool:
    names = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
    there = all(hasattr(torch.ops.aten, name) for name in names)
    ampere = torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] >= 8
    return there and ampere and torch.backends.cuda.flash_sdp_enabled()


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    result, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return result.float(), lse


def _flash_backward(
    gradient: Tensor,
    result: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # there is no dropout
    for_q, for_k, for_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient.to(q.dtype),
        q,
        k,
        v,
        result.to(q.dtype),
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        random_state,
        random_state[:0],
        scale=scale,
    )
    return for_q.float(), for_k.float(), for_v.float()
