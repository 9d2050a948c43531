"""What a collective's arguments say: in which group, of what size, and how many bytes leave here.

Each function of torch.distributed has a reader with its parameters, so Python itself sorts out
positional, named and default arguments. Bytes are those of the ring algorithms (Thakur,
Rabenseifner and Gropp, 2005), whatever the backend does: that is what the planner's formulas count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from trainwright.comm.groups import group_name
from trainwright.comm.stacks import here


class GroupFacts(NamedTuple):
    """A process group as this rank sees it."""

    key: str  # the same on all its ranks, and different from every other group's
    ranks: tuple[int, ...]  # of the world
    place: int  # of this rank in `ranks`

    @property
    def size(self) -> int:
        """Workers in it."""
        return len(self.ranks)


class Described(NamedTuple):
    """A call's arguments, understood."""

    collective: str
    group: dist.ProcessGroup
    facts: GroupFacts
    tensors: Sequence[Tensor]  # whose sizes all ranks must agree on; none where they may differ
    sent: float  # bytes that this rank sends
    on_cuda: bool = False
    peer: int | None = None  # rank of the world at the other end, for `send` and `receive`


@dataclass(slots=True)
class Call:
    """One call of a collective on this rank."""

    collective: str
    group: str  # its name: "tp", "fsdp", …
    facts: GroupFacts
    sequence: int  # how many calls this rank has made on the group, this one included
    sizes: tuple[tuple[torch.dtype, torch.Size], ...]
    sent: int
    peer: int | None = None
    place: str = ""  # the line that asked for it

    @property
    def sizes_text(self) -> str:
        """Types and shapes: `float32[4, 8]`."""
        return ", ".join(
            f"{str(dtype).removeprefix('torch.')}{list(shape)}" for dtype, shape in self.sizes[:4]
        ) + (f" and {len(self.sizes) - 4} more" if len(self.sizes) > 4 else "")


_facts: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupFacts] = weakref.WeakKeyDictionary()


def facts_of(group: dist.ProcessGroup) -> GroupFacts:
    """The group's ranks and this rank's place among them."""
    known = _facts.get(group)
    if known is None:
        ranks = tuple(dist.get_process_group_ranks(group))
        known = GroupFacts(
            str(group.group_name), ranks, dist.get_group_rank(group, dist.get_rank())
        )
        _facts[group] = known
    return known


def describe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described | None:
    """What the call `torch.distributed.NAME(*args, **kwargs)` does.

    None where this rank has no part in it, or where the arguments are wrong: torch says so itself.
    """
    try:
        return READERS[name](*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return None


def make_call(described: Described, sequence: int) -> Call:
    """The call with its number on the group."""
    return Call(
        described.collective,
        group_name(described.group),
        described.facts,
        sequence,
        tuple((tensor.dtype, tensor.shape) for tensor in described.tensors),
        round(described.sent),
        described.peer,
        here(),
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _open(group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, GroupFacts]:
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("this rank is not in the group")
    return group, facts_of(group)


def _describe(
    collective: str,
    group: dist.ProcessGroup | None,
    tensors: Sequence[Tensor],
    share: Callable[[int], float],
    whole: int,
    *,
    agreed: bool = True,
) -> Described:
    """A collective that sends `share(group size)` times `whole` bytes from every rank."""
    group, facts = _open(group)
    on_cuda = bool(tensors) and tensors[0].is_cuda
    sent = share(facts.size) * whole
    return Described(collective, group, facts, tensors if agreed else (), sent, on_cuda)


def _others(n: int) -> float:
    """The share of a whole that is not this rank's."""
    return (n - 1) / n


def _all_reduce(tensor, op=None, group=None, async_op=False):
    return _describe("all_reduce", group, [tensor], lambda n: 2 * _others(n), _size(tensor))


def _all_reduce_coalesced(tensors, op=None, group=None, async_op=False):
    return _describe(
        "all_reduce", group, tensors, lambda n: 2 * _others(n), sum(map(_size, tensors))
    )


def _all_gather_single(output_tensor, input_tensor, group=None, async_op=False):
    return _describe("all_gather", group, [input_tensor], _others, _size(output_tensor))


def _all_gather(tensor_list, tensor, group=None, async_op=False):
    return _describe("all_gather", group, [tensor], lambda n: n - 1, _size(tensor))


def _reduce_scatter_single(output, input, op=None, group=None, async_op=False):
    return _describe("reduce_scatter", group, [input], _others, _size(input))


def _reduce_scatter(output, input_list, op=None, group=None, async_op=False):
    return _describe("reduce_scatter", group, input_list, _others, sum(map(_size, input_list)))


def _all_to_all_single(
    output,
    input,
    output_split_sizes=None,
    input_split_sizes=None,
    group=None,
    async_op=False,
):
    group, facts = _open(group)
    sent = _size(input) * _others(facts.size)
    if input_split_sizes:
        rows = max(input.shape[0], 1)
        sent = _size(input) * (1 - input_split_sizes[facts.place] / rows)
    return Described("all_to_all", group, facts, (), sent, input.is_cuda)


def _all_to_all(output_tensor_list, input_tensor_list, group=None, async_op=False):
    group, facts = _open(group)
    sent = sum(_size(t) for index, t in enumerate(input_tensor_list) if index != facts.place)
    return Described("all_to_all", group, facts, (), sent, input_tensor_list[0].is_cuda)


def _broadcast(tensor, src=None, group=None, async_op=False, group_src=None):
    # In a ring everybody passes it on but the last; here each is booked the mean.
    return _describe("broadcast", group, [tensor], _others, _size(tensor))


def _reduce(tensor, dst=None, op=None, group=None, async_op=False, group_dst=None):
    return _describe("reduce", group, [tensor], _others, _size(tensor))


def _gather(tensor, gather_list=None, dst=None, group=None, async_op=False, group_dst=None):
    sends = gather_list is None
    return _describe("gather", group, [tensor], lambda n: sends, _size(tensor))


def _scatter(tensor, scatter_list=None, src=None, group=None, async_op=False, group_src=None):
    sends = scatter_list is not None
    return _describe("scatter", group, [tensor], lambda n: (n - 1) * sends, _size(tensor))


def _barrier(group=None, async_op=False, device_ids=None):
    return _describe("barrier", group, (), _others, 0)


def _peer(facts: GroupFacts, world_rank: int | None, group_rank: int | None) -> int | None:
    return facts.ranks[group_rank] if group_rank is not None else world_rank


def _send(tensor, dst=None, group=None, tag=0, group_dst=None):
    group, facts = _open(group)
    peer = _peer(facts, dst, group_dst)
    return Described("send", group, facts, [tensor], _size(tensor), tensor.is_cuda, peer)


def _receive(tensor, src=None, group=None, tag=0, group_src=None):
    group, facts = _open(group)
    peer = _peer(facts, src, group_src)
    return Described("receive", group, facts, [tensor], 0, tensor.is_cuda, peer)


def _resolved(group: Any, tag: str) -> dist.ProcessGroup:
    name = functional._resolve_group_name(group, tag)
    return dist.distributed_c10d._resolve_process_group(name)


def _functional_all_reduce(self, reduceOp, group, tag=""):  # noqa: N803
    return _all_reduce(self, group=_resolved(group, tag))


def _functional_all_gather(self, gather_dim, group, tag="", **_):
    group = _resolved(group, tag)
    return _describe("all_gather", group, [self], lambda n: n - 1, _size(self))


def _functional_reduce_scatter(self, reduceOp, scatter_dim, group, tag="", **_):  # noqa: N803
    return _reduce_scatter_single(None, self, group=_resolved(group, tag))


def _functional_all_to_all(self, output_split_sizes, input_split_sizes, group, tag=""):
    group = _resolved(group, tag)
    return _all_to_all_single(None, self, output_split_sizes, input_split_sizes, group)


def _functional_broadcast(self, src, group, tag=""):
    return _broadcast(self, group=_resolved(group, tag))


FUNCTIONAL = "functional."  # before the names of torch.distributed._functional_collectives

READERS: dict[str, Callable[..., Described]] = {
    "all_reduce": _all_reduce,
    "all_reduce_coalesced": _all_reduce_coalesced,
    "all_gather": _all_gather,
    "all_gather_single": _all_gather_single,
    "all_gather_into_tensor": _all_gather_single,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter_single,
    "reduce_scatter_tensor": _reduce_scatter_single,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": _barrier,
    "send": _send,
    "isend": _send,
    "recv": _receive,
    "irecv": _receive,
    # What DTensor calls.
    f"{FUNCTIONAL}all_reduce": _functional_all_reduce,
    f"{FUNCTIONAL}all_gather_tensor": _functional_all_gather,
    f"{FUNCTIONAL}all_gather_single": _functional_all_gather,
    f"{FUNCTIONAL}reduce_scatter_tensor": _functional_reduce_scatter,
    f"{FUNCTIONAL}reduce_scatter_single": _functional_reduce_scatter,
    f"{FUNCTIONAL}all_to_all_single": _functional_all_to_all,
    f"{FUNCTIONAL}broadcast": _functional_broadcast,
}
