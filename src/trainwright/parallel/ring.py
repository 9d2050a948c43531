"""Ring attention: keys and values go round the workers, each meeting its own queries with them.

Liu et al. 2023 (arXiv:2310.01889), in head-tail order: a row is cut into twice as many chunks as
workers, and worker r has chunk r and the r-th from the end, so that causal work is the same for
all (Llama 3, arXiv:2407.21783, section 3.3.2). Scores never exist but in tiles; the backward pass
sends keys and values round again, with their gradients behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from trainwright.kernels.partial_attention import (
    Sight,
    laid_out,
    like_result,
    merge,
    partial_attention,
    partial_attention_backward,
)

# By the name of the group: a custom operation's arguments are tensors, numbers and strings.
_groups: dict[str, dist.ProcessGroup] = {}
KEYS_AND_VALUES, GRADIENTS = 0, 1  # tags: both may be under way between the same two workers


def head_tail_slots(worker: int, workers: int, tokens: int, device: torch.device) -> Tensor:
    """The slots of a row, ascending, that are a worker's: `tokens` (an even number) of them."""
    chunk = tokens // 2
    tail = 2 * workers - 1 - worker
    within = torch.arange(chunk, device=device)
    return torch.cat([worker * chunk + within, tail * chunk + within])


def register(group: dist.ProcessGroup) -> str:
    """Make `group` known to `ring_attention`; the name to call it by."""
    _groups[group.group_name] = group
    return group.group_name


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    group: str,
) -> Tensor:
    """`kernels.attention.attention` of rows whose tokens lie on the workers of a group.

    q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim] are this
    worker's columns, in the order of `head_tail_slots`; segments [batch, sequence] are whole rows'.
    A token sees what `attention_mask` says, in fp32 sums. q, k, v, the result and its log-sum-exp
    are kept for the backward pass, no other worker's keys. Collective, in both passes. `group` is
    what `register` returned. torch.compile sees one operation, and `selective` recompute keeps
    its result.
    """
    result, _ = _attend(q, k, v, segments, window, scale, softcap, group)
    return result


@torch.library.custom_op("trainwright::ring_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    ring = _Ring(_groups[group], q.shape[2], segments, window)
    wide = torch.promote_types(q.dtype, torch.float32)
    result = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for owner, keys_there, values_there in ring.tour(k, v):
        queries, keys, sight = ring.meeting(owner, q.device)
        part = partial_attention(
            q[:, :, queries],
            keys_there[:, :, keys],
            values_there[:, :, keys],
            sight,
            scale=scale,
            softcap=softcap,
        )
        met = (slice(None), slice(None), queries)
        result[met], lse[met] = merge(result[met], lse[met], *part)
    return laid_out(result, v.dtype), lse


@torch.library.custom_op("trainwright::ring_attention_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    result: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _Ring(_groups[group], q.shape[2], segments, window)
    wide = torch.promote_types(q.dtype, torch.float32)
    for_q = torch.zeros_like(q, dtype=wide)
    own = torch.empty(0)
    behind: _Passing | None = None
    for owner, keys_there, values_there in ring.tour(k, v):
        queries, keys, sight = ring.meeting(owner, q.device)
        part_q, part_k, part_v = partial_attention_backward(
            gradient[:, :, queries],
            result[:, :, queries],
            lse[:, :, queries],
            q[:, :, queries],
            keys_there[:, :, keys],
            values_there[:, :, keys],
            sight,
            scale=scale,
            softcap=softcap,
        )
        for_q[:, :, queries] += part_q
        share = k.new_zeros(k.numel() + v.numel(), dtype=wide)
        share_k, share_v = _unpacked(share, k, v)
        share_k[:, :, keys], share_v[:, :, keys] = part_k, part_v
        if owner == ring.worker:
            own = share
            continue
        # The sums of a block start with the first worker that it visits and travel on behind it,
        # one worker late, while that worker is busy with the next block; at last they are home.
        if behind is not None:
            share += behind.arrived()
        behind = ring.pass_on(share, GRADIENTS)
    if behind is not None:
        own += behind.arrived()
    for_k, for_v = (x.to(k.dtype, copy=True) for x in _unpacked(own, k, v))
    return for_q.to(q.dtype), for_k, for_v


@_attend_backward.register_fake
def _like_gradients(
    gradient: Tensor, result: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # Those of keys and values come out of a buffer of their own, in one piece.
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, segments)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 5


_attend.register_fake(like_result)
_attend.register_autograd(_differentiate, setup_context=_remember)


@dataclass
class _Passing:
    """A tensor on its way to the next worker, and one from the worker before."""

    sent: Tensor  # held until it has left
    received: Tensor
    works: list[dist.Work]

    def arrived(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _Ring:
    """The way round the workers, and what a worker's queries see of each one's keys."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        tokens: int,
        segments: Tensor | None,
        window: int | None,
    ) -> None:
        self.group, self.tokens = group, tokens
        self.segments, self.window = segments, window
        self.worker, self.workers = dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, tensor: Tensor, tag: int) -> _Passing:
        """Start sending to the next worker, and receiving as much from the one before."""
        received = torch.empty_like(tensor)
        peers = ((self.worker + step) % self.workers for step in (1, -1))
        after, before = (dist.get_global_rank(self.group, peer) for peer in peers)
        # Of the module that P2POp compares them with, whatever stands in torch.distributed.
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(distributed_c10d.isend, tensor, after, self.group, tag),
                dist.P2POp(distributed_c10d.irecv, received, before, self.group, tag),
            ]
        )
        return _Passing(tensor, received, works)

    def tour(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every worker's keys and values, with its number, from the own backwards.

        While the caller works on one block, it goes on and the next one comes.
        """
        block = torch.cat([k.flatten(), v.flatten()])
        for step in range(self.workers):
            last = step == self.workers - 1
            passing = None if last else self.pass_on(block, KEYS_AND_VALUES)
            yield (self.worker - step) % self.workers, *_unpacked(block, k, v)
            if passing is not None:
                block = passing.arrived()

    def meeting(self, owner: int, device: torch.device) -> tuple[slice, slice, Sight]:
        """Which of the own queries may see which keys of `owner`, and what they see of them.

        Of an earlier worker's chunks all queries come after the first and before the second; of a
        later worker's, the second half of the queries comes after both.
        """
        half = self.tokens // 2
        everything = slice(0, self.tokens)
        queries, keys = everything, everything
        if owner < self.worker:
            keys = slice(0, half)
        elif owner > self.worker:
            queries = slice(half, self.tokens)
        at = head_tail_slots(self.worker, self.workers, self.tokens, device)[queries]
        behind = head_tail_slots(owner, self.workers, self.tokens, device)[keys]
        if self.segments is not None:
            of_query, of_key = self.segments[:, at], self.segments[:, behind]
            return queries, keys, Sight(at, behind, of_query, of_key, self.window)
        pattern = None
        if self.window is None:
            pattern = "causal" if owner == self.worker else "all"
        return queries, keys, Sight(at, behind, window=self.window, pattern=pattern)


def _unpacked(block: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a flat block that holds what is shaped like k, then what is shaped like v."""
    keys, values = block.split([k.numel(), v.numel()])
    return keys.view(k.shape), values.view(v.shape)
