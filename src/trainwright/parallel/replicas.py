"""Replicated data parallelism: whole weights everywhere, gradients summed over the replicas.

Like torch's DDP, gradients live in flat buckets that are summed as soon as the last micro-batch's
backward pass has filled them, while it goes on. Unlike it, this needs no wrapper around the model:
it bears several forward passes before a backward pass (pipelines) and weight gradients that come
late, and sums instead of averaging.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as DDP's: large enough for the network, small enough to begin early


class Bucket:
    """Gradients that are summed together, as views of one flat buffer."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        total = sum(p.numel() for p in parameters)
        self.flat = parameters[0].new_zeros(total)
        pieces = self.flat.split([p.numel() for p in parameters])
        self.views = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        self.missing = 0
        self.work: dist.Work | None = None


class ReplicaGradients:
    """Sums the gradients of `parameters` over `group`, once a step."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.group = group
        self.buckets = _into_buckets(parameters)
        self.reducing = False
        self._next = 0  # the first bucket that is not being summed yet
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                self._bucket_of[parameter] = bucket
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """At the beginning of a step: gradients are zero, and views of the buckets."""
        self.reducing = False
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.work = None
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view

    def expect_last(self) -> None:
        """The next backward pass completes the gradients: sum each bucket when it is full."""
        self.reducing, self._next = True, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Sum what has not been summed yet, and wait for all of it."""
        for bucket in self.buckets:
            if bucket.work is None:
                self._sum(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None
        self.reducing = False

    def _arrived(self, parameter: Tensor) -> None:
        if not self.reducing:
            return
        self._bucket_of[parameter].missing -= 1  # type: ignore[index]
        # In one order on all workers, whichever gradients one of them has first, or has not at all.
        while self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
            self._sum(self.buckets[self._next])
            self._next += 1

    def _sum(self, bucket: Bucket) -> None:
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)


def _into_buckets(parameters: Sequence[nn.Parameter]) -> list[Bucket]:
    """Buckets in the order in which gradients come: the last parameter's first."""
    buckets: list[list[nn.Parameter]] = []
    room: dict[torch.dtype, int] = {}
    current: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        size, kind = parameter.numel() * parameter.element_size(), parameter.dtype
        if kind not in current or room[kind] < size:
            current[kind], room[kind] = [], BUCKET_BYTES
            buckets.append(current[kind])
        current[kind].append(parameter)
        room[kind] -= size
    return [Bucket(bucket) for bucket in buckets]
