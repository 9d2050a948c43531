"""What travels between pipeline stages: streams forward, their gradients backward.

Sends go off at once and are held until they are done; receives are posted a little before they are
needed. Neighbouring stages on one rank hand over without either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[tuple[int, ...], torch.dtype]
GroupOf = Callable[["Crossing"], dist.ProcessGroup]

AHEAD = 2  # receives posted beforehand: one is being waited for, one may come in meanwhile


class Crossing(NamedTuple):
    """A tensor on its way: forward from stage `boundary` to the next, or backward."""

    backward: bool
    boundary: int  # the stage before it
    micro_batch: int

    @property
    def origin(self) -> int:
        """The stage that sends."""
        return self.boundary + self.backward

    @property
    def destination(self) -> int:
        """The stage that receives."""
        return self.boundary + 1 - self.backward


class Boundaries:
    """This rank's sends and receives during one pass over the micro-batches.

    `ranks` are the pipeline's, as ranks of the world, and `placement` the place among them of each
    stage. `expected` lists what this rank will receive, in the order in which it asks for it;
    `shape_of` a micro-batch tells how it looks.

    `group_of` a crossing is the process group that it takes. gloo tells messages between two ranks
    apart by their tags, so that all may share one group. NCCL has no tags: there each boundary and
    direction has a group of its own, in which micro-batches come in their order.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        placement: Sequence[int],
        expected: Iterable[Crossing],
        shape_of: Callable[[int], Shape],
        group_of: GroupOf,
        device: torch.device,
    ) -> None:
        self.ranks, self.placement = ranks, placement
        self.shape_of, self.group_of, self.device = shape_of, group_of, device
        self._handed: dict[Crossing, Tensor] = {}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._expected = deque(crossing for crossing in expected if self._is_far(crossing))
        self._posted: deque[tuple[Crossing, dist.Work, Tensor]] = deque()

    def send(self, crossing: Crossing, tensor: Tensor) -> None:
        """Let `tensor`, without its graph, go; it must not be changed afterwards."""
        tensor = tensor.detach()
        shape, dtype = self.shape_of(crossing.micro_batch)
        if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
            raise ValueError(
                f"stage {crossing.origin} sends {tensor.dtype} {list(tensor.shape)}, and stage "
                f"{crossing.destination} expects {dtype} {list(shape)}"
            )
        if not self._is_far(crossing):
            self._handed[crossing] = tensor
            return
        tensor = tensor.contiguous()
        work = dist.isend(
            tensor,
            self._rank(crossing.destination),
            group=self.group_of(crossing),
            tag=self._tag(crossing),
        )
        assert work is not None
        self._sent.append((work, tensor))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def receive(self, crossing: Crossing) -> Tensor:
        """What was sent over `crossing`, once it is here."""
        if not self._is_far(crossing):
            return self._handed.pop(crossing)
        self._post(AHEAD)
        posted, work, tensor = self._posted.popleft()
        assert posted == crossing, f"asked for {crossing}, while {posted} comes next"
        work.wait()
        self._post(AHEAD - 1)
        return tensor

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _post(self, count: int) -> None:
        while self._expected and len(self._posted) < count:
            crossing = self._expected.popleft()
            shape, dtype = self.shape_of(crossing.micro_batch)
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            work = dist.irecv(
                tensor,
                self._rank(crossing.origin),
                group=self.group_of(crossing),
                tag=self._tag(crossing),
            )
            assert work is not None
            self._posted.append((crossing, work, tensor))

    def _is_far(self, crossing: Crossing) -> bool:
        return self.placement[crossing.origin] != self.placement[crossing.destination]

    def _rank(self, stage: int) -> int:
        return self.ranks[self.placement[stage]]

    def _tag(self, crossing: Crossing) -> int:
        return (crossing.micro_batch * len(self.placement) + crossing.boundary) * 2 + (
            crossing.backward
        )
