"""Attention over rows that lie on several workers, against one process that has them whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.workers import run_on
from trainwright.comm import collectives
from trainwright.kernels import partial_attention
from trainwright.kernels.attention import (
    BlockMask,
    attention,
    attention_mask,
    attention_reference,
    slotted_block_mask,
)
from trainwright.parallel.context import METHODS, ContextParallel
from trainwright.parallel.ring import _Ring, head_tail_slots

CPU = torch.device("cpu")
SCALE = 0.3
SEQUENCE = 24  # divides by 2, 3 and 4 workers, and by twice as many
HEADS, KEY_DIM, VALUE_DIM = 12, 6, 10
# Documents of two rows, with borders inside chunks, and -1 for padding.
PACKED = [[0] * 5 + [1] * 12 + [2] * 7, [-1] * 3 + [4] * 9 + [5] * 8 + [-1] * 4]
# name → (key-value heads, documents, window, soft cap)
ROWS: dict[str, tuple[int, list[list[int]] | None, int | None, float | None]] = {
    "causal": (12, None, None, None),
    "packed": (4, PACKED, None, None),
    "window": (2, None, 7, None),
    "capped": (1, None, None, 1.5),
    "all": (2, PACKED, 4, 1.5),
}


def inputs(kv_heads: int, sequence: int = SEQUENCE) -> tuple[Tensor, ...]:
    """Whole rows of queries, keys, values, and of the result's gradient, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, KEY_DIM), (kv_heads, KEY_DIM), (kv_heads, VALUE_DIM), (HEADS, VALUE_DIM)]
    return tuple(
        torch.randn(2, heads, sequence, dim, generator=generator, dtype=torch.float64)
        for heads, dim in shapes
    )


def attend_on_columns(
    method: str,
    name: str,
    sequence: int = SEQUENCE,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """This worker's slots, and there the result and the gradients of q, k and v."""
    kv_heads, documents, window, softcap = ROWS[name]
    context = ContextParallel(method, dist.group.WORLD)  # type: ignore[arg-type]
    slots = context.slots(sequence, CPU)
    q, k, v, upstream = (x[:, :, slots].to(dtype) for x in inputs(kv_heads, sequence))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = context.mask(
        None if documents is None else torch.tensor(documents).repeat_interleave(sequence // 24, 1),
        sequence=sequence,
        window=window,
        softcap=softcap,
        device=CPU,
    )
    result = context.attend(q, k, v, mask=mask, scale=SCALE, softcap=softcap)
    assert result.dtype == dtype
    gradients = torch.autograd.grad(result, (q, k, v), upstream)
    return [x.detach().double().numpy() for x in (slots, result, *gradients)]


def joined(answers: list[list[Any]]) -> list[Tensor]:
    """Result and gradients of whole rows, from the columns of each worker."""
    slots = np.concatenate([answer[0] for answer in answers]).astype(int)
    assert sorted(slots) == list(range(len(slots)))
    back = np.argsort(slots)
    parts = zip(*(answer[1:] for answer in answers), strict=True)
    return [torch.from_numpy(np.concatenate(part, 2)[:, :, back]) for part in parts]


def expected_rows(name: str) -> list[Tensor]:
    kv_heads, documents, window, softcap = ROWS[name]
    *leaves, upstream = inputs(kv_heads)
    q, k, v = (x.requires_grad_() for x in leaves)
    result = attention_reference(
        q,
        k,
        v,
        segments=None if documents is None else torch.tensor(documents),
        window=window,
        scale=SCALE,
        softcap=softcap,
    )
    return [result.detach(), *torch.autograd.grad(result, (q, k, v), upstream)]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_columns_are_as_whole_rows(method: str, name: str) -> None:
    wanted = expected_rows(name)
    for workers in (2, 3, 4):
        for got, want in zip(
            joined(run_on(workers, attend_on_columns, method, name)), wanted, strict=True
        ):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_long_rows_in_many_tiles(method: str) -> None:
    """Against this process's own fused kernel."""
    sequence, (kv_heads, documents, window, _) = 24 * 20, ROWS["packed"]
    *leaves, upstream = inputs(kv_heads, sequence)
    q, k, v = (x.requires_grad_() for x in leaves)
    mask = attention_mask(
        torch.tensor(documents).repeat_interleave(20, 1),
        queries=sequence,
        keys=sequence,
        window=window,
        device=CPU,
    )
    result = attention(q, k, v, mask=mask, scale=SCALE)
    wanted = [result, *torch.autograd.grad(result, (q, k, v), upstream)]
    answers = run_on(2, attend_on_columns, method, "packed", sequence)
    for got, want in zip(joined(answers), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_exact_to_its_own_rounding(method: str) -> None:
    """However many parts a softmax was put together from."""
    answers = run_on(4, attend_on_columns, method, "packed", SEQUENCE, torch.bfloat16)
    for got, want in zip(joined(answers), expected_rows("packed"), strict=True):
        assert (got - want).norm() <= 2**-6.5 * want.norm()


def attend_with_some_heads(method: str) -> list[Any]:
    """Two groups of two workers, each with half of the heads, as under tensor parallelism."""
    groups = [dist.new_group([tensor, tensor + 2]) for tensor in range(2)]
    tensor = dist.get_rank() % 2
    context = ContextParallel(method, groups[tensor])
    slots = context.slots(SEQUENCE, CPU)
    tensors = inputs(4)
    q, k, v, upstream = (x.chunk(2, 1)[tensor][:, :, slots] for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = context.mask(
        torch.tensor(PACKED), sequence=SEQUENCE, window=None, softcap=None, device=CPU
    )
    result = context.attend(q, k, v, mask=mask, scale=SCALE)
    gradients = torch.autograd.grad(result, (q, k, v), upstream)
    return [x.detach().numpy() for x in (slots, result, *gradients)]


@pytest.mark.parametrize("method", METHODS)
def test_each_group_has_its_own_heads(method: str) -> None:
    answers = run_on(4, attend_with_some_heads, method)
    halves = [joined([answers[tensor], answers[tensor + 2]]) for tensor in range(2)]
    for *got, want in zip(*halves, expected_rows("packed"), strict=True):
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-12, rtol=1e-12)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this worker sends, by the way they go."""
    sent = {"p2p": 0, "swaps": 0, "all_to_all": 0}
    others = (dist.get_world_size() - 1) / dist.get_world_size()

    def watch(name: str, kind: str, count: Callable[..., float], room: Any = dist) -> Any:
        original = getattr(room, name)

        def call(*arguments: Any, **named: Any) -> Any:
            sent[kind] += int(count(*arguments))
            return original(*arguments, **named)

        return mock.patch.object(room, name, call)

    def p2p(operations: list[dist.P2POp]) -> int:
        return sum(o.tensor.nbytes for o in operations if o.op.__name__ == "isend")

    def swapped(send: list[Tensor], receive: list[Tensor], group: Any) -> int:
        return sum(x.nbytes for rank, x in enumerate(send) if rank != dist.get_rank(group))

    with (
        watch("batch_isend_irecv", "p2p", p2p),
        watch("_swap", "swaps", swapped, collectives),  # gathers and scattered sums, on gloo
        watch("all_to_all_single", "all_to_all", lambda out, x, *_: others * x.nbytes),
    ):
        yield sent


def bytes_of_passes(method: str, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    context = ContextParallel(method, dist.group.WORLD)  # type: ignore[arg-type]
    slots = context.slots(SEQUENCE, CPU)
    q, k, v, upstream = (x[:, :, slots].to(dtype) for x in inputs(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = context.mask(None, sequence=SEQUENCE, window=None, softcap=None, device=CPU)
    with counted() as forward:
        result = context.attend(q, k, v, mask=mask, scale=SCALE)
    with counted() as backward:
        result.backward(upstream)
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workers", [2, 4])
def test_bytes_are_those_of_the_closed_formulas(workers: int, dtype: torch.dtype) -> None:
    """Keys and values of c - 1 others; their gradients, of a ring in fp32; Ulysses' exchanges."""
    per_token = 2 * SEQUENCE // workers  # of both rows, on one worker
    both = per_token * 4 * (KEY_DIM + VALUE_DIM)
    every = per_token * (HEADS * (KEY_DIM + VALUE_DIM) + 4 * (KEY_DIM + VALUE_DIM))
    size = dtype.itemsize
    nothing = {"p2p": 0, "swaps": 0, "all_to_all": 0}
    exchanged = every * size * (workers - 1) // workers
    wanted = {
        "ring": (
            {"p2p": (workers - 1) * both * size},
            {"p2p": (workers - 1) * both * (size + 4)},
        ),
        "all_gather": (
            {"swaps": (workers - 1) * both * size},
            {"swaps": (workers - 1) * both * size},
        ),
        "ulysses": ({"all_to_all": exchanged}, {"all_to_all": exchanged}),
    }
    for method, (forward, backward) in wanted.items():
        for answer in run_on(workers, bytes_of_passes, method, dtype):
            assert answer == (nothing | forward, nothing | backward), method


def kept_for_backward(method: str) -> tuple[int, int]:
    """Bytes that attention keeps of plain rows; and of its inputs, its result and their lse."""
    context = ContextParallel(method, dist.group.WORLD)  # type: ignore[arg-type]
    slots = context.slots(SEQUENCE, CPU)
    q, k, v, upstream = (x[:, :, slots].float() for x in inputs(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = context.mask(None, sequence=SEQUENCE, window=None, softcap=None, device=CPU)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        context.attend(q, k, v, mask=mask, scale=SCALE)
    lse = upstream[..., 0]
    return sum(kept.values()), sum(x.nbytes for x in (q, k, v, upstream, lse))


def test_a_ring_keeps_no_other_workers_keys() -> None:
    for kept, needed in run_on(4, kept_for_backward, "ring"):
        assert kept == needed
    for kept, needed in run_on(4, kept_for_backward, "all_gather"):
        assert kept > 1.5 * needed


def work_of_a_ring(documents: list[list[int]] | None, window: int | None) -> int:
    """Scores that this worker works out, in small tiles, of one head of one row."""
    segments = None if documents is None else torch.tensor(documents[:1])
    ring = _Ring(dist.group.WORLD, 240 // dist.get_world_size(), segments, window)  # type: ignore[arg-type]
    with mock.patch.multiple(partial_attention, QUERIES=10, GRAIN=2):
        return sum(
            (queries.stop - queries.start) * (keys.stop - keys.start)
            for owner in range(ring.workers)
            for queries, keys, _ in ring.meeting(owner, CPU)[2].tiles(slice(0, 1))
        )


def test_a_ring_shares_causal_work_and_leaves_out_what_nothing_sees() -> None:
    causal = run_on(4, work_of_a_ring, None, None)
    assert max(causal) == min(causal) <= 0.55 * 240 * 240 / 4
    assert sum(run_on(4, work_of_a_ring, None, 20)) < 0.3 * sum(causal)
    assert sum(run_on(4, work_of_a_ring, [[0] * 80 + [1] * 160], None)) < 0.65 * sum(causal)


def test_slots_are_cut_evenly_or_not_at_all() -> None:
    assert head_tail_slots(1, 2, 6, CPU).tolist() == [3, 4, 5, 6, 7, 8]
    assert head_tail_slots(0, 2, 6, CPU).tolist() == [0, 1, 2, 9, 10, 11]
    assert run_on(2, refused_lengths, "ring") == [[1, 2, 3, 5, 6, 7]] * 2
    assert run_on(2, refused_lengths, "ulysses") == [[1, 3, 5, 7]] * 2


def refused_lengths(method: str) -> list[int]:
    context = ContextParallel(method, dist.group.WORLD)  # type: ignore[arg-type]
    refused = []
    for sequence in range(1, 9):
        try:
            context.slots(sequence, CPU)
        except ValueError:
            refused.append(sequence)
    return refused


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("documents", [None, PACKED])
@pytest.mark.parametrize("window", [None, 4])
def test_block_masks_by_slots(documents: list[list[int]] | None, window: int | None) -> None:
    """CUDA's path of gathered keys; its forward pass also runs, uncompiled, without one."""
    if BlockMask is None:
        pytest.skip("this torch has no flex attention")
    segments = None if documents is None else torch.tensor(documents)
    q, k, v, _ = (x.float() for x in inputs(HEADS))
    v = v[..., :KEY_DIM]
    wanted = attention_reference(q, k, v, segments=segments, window=window, scale=SCALE)
    behind = torch.cat([head_tail_slots(worker, 2, 12, CPU) for worker in range(2)])
    for worker in range(2):
        at = head_tail_slots(worker, 2, 12, CPU)
        mask = slotted_block_mask(at, behind, segments, window)
        got = attention(q[:, :, at], k[:, :, behind], v[:, :, behind], mask=mask, scale=SCALE)
        torch.testing.assert_close(got, wanted[:, :, at], atol=2e-6, rtol=1e-5)
