"""Collectives through which gradients flow, each with its counterpart as the backward pass.

Every function takes a process group; None, or a group of one, makes it the identity. Calls go
through the attributes of `torch.distributed`, where the traffic meter sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def size_of(group: Group) -> int:
    """Workers in `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Every worker's `x` joined along `dim` in rank order; backward sums and takes the own part."""
    return x if size_of(group) == 1 else _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """The own part, along `dim`, of the sum of every worker's `x`; backward gathers.

    `x.shape[dim]` divides by the number of workers.
    """
    return x if size_of(group) == 1 else _ScatterSum.apply(x, dim, group)


def sum_forward(x: Tensor, group: Group) -> Tensor:
    """The sum of every worker's `x`; its gradient, equal on all of them, passes as it is."""
    return x if size_of(group) == 1 else _SumForward.apply(x, group)


def sum_backward(x: Tensor, group: Group) -> Tensor:
    """`x`, equal on every worker, as it is; backward sums what each contributes to its gradient."""
    return x if size_of(group) == 1 else _SumBackward.apply(x, group)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Rows of `x` to their workers: `send[r]` rows go to worker r, `receive[r]` come from it.

    Rows lie in the order of their destination, and arrive in that of their origin. Backward sends
    gradients the way back.
    """
    return x if size_of(group) == 1 else _Exchange.apply(x, list(send), list(receive), group)


def gather_plain(x: Tensor, dim: int, group: Group) -> Tensor:
    """`gather` without a gradient."""
    workers = size_of(group)
    if workers == 1:
        return x
    ahead = x.movedim(dim, 0).contiguous()
    whole = ahead.new_empty(workers * ahead.shape[0], *ahead.shape[1:])
    dist.all_gather_into_tensor(whole, ahead, group=group)
    # One copy here instead of one in every product that reads it.
    return whole.movedim(0, dim).contiguous()


def scatter_sum_plain(x: Tensor, dim: int, group: Group) -> Tensor:
    """`scatter_sum` without a gradient."""
    workers = size_of(group)
    if workers == 1:
        return x
    ahead = x.movedim(dim, 0).contiguous()
    own = ahead.new_empty(ahead.shape[0] // workers, *ahead.shape[1:])
    dist.reduce_scatter_tensor(own, ahead, group=group)
    return own.movedim(0, dim).contiguous()


def exchange_plain(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """`exchange` without a gradient."""
    if size_of(group) == 1:
        return x
    result = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), list(receive), list(send), group=group)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gather_plain(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum_plain(gradients[0], ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return scatter_sum_plain(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gather_plain(gradients[0], ctx.dim, ctx.group), None, None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchange_plain(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back = exchange_plain(gradients[0], ctx.receive, ctx.send, ctx.group)
        return back, None, None, None
