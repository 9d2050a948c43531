"""Times a kernel or a collective at a shape, on this worker among those that do the same at once.

What is timed is what a training step calls, made anew as a step makes it: results are allocated,
and operands take turns, so that a small product does not find all of them in the cache.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainwright.comm.collectives import gather_plain, scatter_sum_plain
from trainwright.kernels.attention import attention, attention_mask
from trainwright.kernels.partial_attention import slotted_attention
from trainwright.models.decoder import Decoder
from trainwright.parallel.precision import COMPUTE_DTYPES, autocast
from trainwright.parallel.ring import head_tail_slots
from trainwright.planner.cluster.calibration import KERNELS
from trainwright.planner.cost.measured import layer_config

Action = Callable[[], object]

WINDOWS, WINDOW_SECONDS = 3, 0.04
_TURNS = 3  # operands of a product that take turns


@dataclass(frozen=True)
class Point:
    """What is to be timed: `planner.cluster.calibration.KERNELS` says what the shape means."""

    kernel: str
    precision: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a worker measures; `groups` by their size, each worker in one of each size.

    `turn` is what a second of a CPU takes where all workers' threads take turns on the cores: 2
    with twice as many, and half as long with two threads that share the work.
    """

    device: torch.device
    groups: dict[int, dist.ProcessGroup]
    turn: float = 1.0


def measure(point: Point, place: Place) -> float:
    """Seconds that `point` takes, the best of a few windows. Collective.

    All workers are at it for the whole of a window, so that each has what the others leave it. On a
    CPU kernels are timed by the seconds that it gave them, so that other programs do not count.
    """
    action = prepare(point, place)
    action()
    computes = place.device.type == "cpu" and KERNELS[point.kernel] != ("workers", "bytes")
    seconds = _best(action, place, place.turn if computes else None)
    if point.kernel.endswith("_backward"):
        return max(seconds - measure(_forward_of(point), place), 1e-9)
    return seconds


def prepare(point: Point, place: Place) -> Action:
    """`point` as something to be called; a backward pass comes with its forward pass."""
    kernel, shape, device = point.kernel, point.shape, place.device
    if kernel == "product":
        return _product(shape, COMPUTE_DTYPES[point.precision], device)
    if "attention" in kernel:
        return _attention(point, device)
    if kernel.startswith("layer"):
        return _layer(point, device)
    if kernel == "elements":
        left, right = (torch.ones(max(1, shape[0] // 6), device=device).bfloat16() for _ in "ab")
        return lambda: left + right
    return _collective(kernel, shape, place)


def hidden_share(place: Place) -> float:
    """Share of a sum's time that passes unnoticed while products are computed. Collective.

    What gets done of both together, over what gets done of each alone in as much time: 1 of each
    where they do not disturb one another, half of each where they take turns.
    """
    workers = max(place.groups)
    message = torch.ones(1 << 22, device=place.device)
    product = _product((1024, 1024, 1024), torch.float32, place.device)
    group = place.groups[workers]

    def reduce() -> object:
        return dist.all_reduce(message, group=group, async_op=True)

    def alone() -> None:
        reduce().wait()  # type: ignore[attr-defined]
        message.fill_(1.0)

    alone()
    sum_seconds, product_seconds = _best(alone, place, None), _best(product, place, None)
    # As many products as take a sum's time, while it is under way.
    count = max(1, round(sum_seconds / product_seconds))

    def both() -> None:
        work = reduce()
        for _ in range(count):
            product()
        work.wait()  # type: ignore[attr-defined]
        message.fill_(1.0)

    both()
    hidden = sum_seconds + count * product_seconds - _best(both, place, None)
    return min(max(hidden / min(sum_seconds, count * product_seconds), 0.0), 1.0)


def _best(action: Action, place: Place, turn: float | None) -> float:
    """Seconds of one call, in the best window: other work on the machine only makes it slower.

    By the clock, or `turn` times the CPU's own.
    """

    def taken(calls: int) -> float:
        _meet(place)
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(calls):
            action()
        _settle(place)
        if turn is None:
            return (time.perf_counter() - began) / calls
        return turn * (time.process_time() - worked) / calls

    # All workers make as many calls: a collective needs them all.
    calls = _agreed(math.ceil(WINDOW_SECONDS / taken(1)), place)
    return min(taken(calls) for _ in range(WINDOWS))


def _meet(place: Place) -> None:
    if place.groups:
        dist.barrier()
    _settle(place)


def _agreed(number: int, place: Place) -> int:
    if not place.groups:
        return number
    shared = torch.tensor([number], device=place.device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


def _settle(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def _product(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Action:
    rows, columns, inner = shape
    operands = itertools.cycle(
        (
            torch.randn(rows, inner, device=device).to(dtype),
            torch.randn(columns, inner, device=device).to(dtype),
        )
        for _ in range(_TURNS)
    )
    return lambda: F.linear(*next(operands))


def _forward_of(point: Point) -> Point:
    return Point(point.kernel.removesuffix("_backward"), point.precision, point.shape)


def _attention(point: Point, device: torch.device) -> Action:
    heads, tokens, width = point.shape
    backward = point.kernel.endswith("_backward")
    rows = max(1, heads // 8)  # kernels go through a few rows at a time

    def one() -> Tensor:
        values = torch.randn(rows, tokens, heads // rows, width, device=device)
        made = values.to(COMPUTE_DTYPES[point.precision]).transpose(1, 2)
        return made.requires_grad_(backward)

    q, k, v = one(), one(), one()
    gradient, mask = one().detach(), None
    halves = torch.cat([head_tail_slots(worker, 2, tokens // 2, device) for worker in (0, 1)])
    own = halves[: tokens // 2]
    if point.kernel.startswith("slotted"):
        q, gradient = q[:, :, own].detach().requires_grad_(backward), gradient[:, :, own]
    if point.kernel.startswith("packed"):
        segments = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
        segments[::2, tokens // 3 :] = segments[1::2, tokens - tokens // 3 :] = 1
        mask = attention_mask(segments, queries=tokens, keys=tokens, device=device)

    def action() -> None:
        if len(own) == q.shape[2]:
            scale = width**-0.5
            mixed = slotted_attention(q, k, v, query_slots=own, key_slots=halves, scale=scale)
        else:
            mixed = attention(q, k, v, mask=mask, scale=width**-0.5)
        if backward:
            torch.autograd.grad(mixed, (q, k, v), gradient)

    return action


def _layer(point: Point, device: torch.device) -> Action:
    rows, tokens, hidden, *_ = point.shape
    model = Decoder(layer_config(point.shape)).to(device)
    (block,) = model.blocks
    backward = point.kernel.endswith("_backward")
    stream = torch.randn(rows, tokens, hidden, device=device)
    stream = stream.to(COMPUTE_DTYPES[point.precision]).requires_grad_()
    positions = torch.arange(tokens, device=device).unsqueeze(0)
    ((cos, sin),) = [
        table
        for spec, table in model.model.rotary_tables(positions, None, stream.dtype).items()
        if spec is not None
    ]
    wanted, gradient = (stream, *block.parameters()), torch.randn_like(stream)

    def action() -> None:
        with autocast(point.precision, device):
            after = block(stream, cos, sin)
        if backward:
            torch.autograd.grad(after, wanted, gradient)

    return action


def _collective(kernel: str, shape: Sequence[int], place: Place) -> Action:
    workers, size = shape
    group, device = place.groups[workers], place.device
    whole = torch.ones(max(1, size // 4 // workers) * workers, device=device)
    part = whole.chunk(workers)[0].clone()
    result = torch.empty_like(whole)
    if kernel == "all_reduce":
        result.zero_()  # sums of sums would overflow
        return lambda: dist.all_reduce(result, group=group)
    if kernel == "all_gather":
        return lambda: dist.all_gather_into_tensor(result, part, group=group)
    if kernel == "reduce_scatter":
        own = torch.empty_like(part)
        return lambda: dist.reduce_scatter_tensor(own, whole, group=group)
    if kernel == "gather":
        return lambda: gather_plain(part, 0, group)
    if kernel == "scatter_sum":
        return lambda: scatter_sum_plain(whole, 0, group)
    if kernel == "all_to_all":
        return lambda: dist.all_to_all_single(result, whole, group=group)
    assert kernel == "send"
    return lambda: _pass_on(whole, result, group)


def _pass_on(own: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
    """To the next of the ring, and from the one before."""
    place, workers = dist.get_rank(group), dist.get_world_size(group)
    messages = (
        dist.irecv(received, group=group, group_src=(place - 1) % workers),
        dist.isend(own, group=group, group_dst=(place + 1) % workers),
    )
    for message in messages:
        if message is not None:
            message.wait()
