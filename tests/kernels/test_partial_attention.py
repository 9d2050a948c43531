"""Attention in parts: each part, and parts put together, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainwright.kernels import partial_attention as kernel
from trainwright.kernels.attention import attention_reference
from trainwright.kernels.partial_attention import (
    Sight,
    merge,
    partial_attention,
    partial_attention_backward,
    partial_attention_reference,
    slotted_attention,
)

SCALE = 0.3
TOKENS = 24
# Documents of a row, and -1 for padding.
PACKED = torch.tensor([[0] * 5 + [1] * 12 + [2] * 7, [-1] * 3 + [4] * 9 + [5] * 8 + [-1] * 4])
CASES = pytest.mark.parametrize(
    ("segments", "window", "softcap", "kv_heads"),
    [
        (None, None, None, 4),
        (None, None, 1.5, 2),
        (None, 5, None, 1),
        (PACKED, None, None, 2),
        (PACKED, 4, 1.5, 2),
    ],
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens are several tiles, of one row each."""
    monkeypatch.setattr(kernel, "QUERIES", 5)
    monkeypatch.setattr(kernel, "KEYS", 7)
    monkeypatch.setattr(kernel, "HEADS", 4)
    monkeypatch.setattr(kernel, "GRAIN", 2)


def inputs(kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Queries and keys of 6 channels, values of 10."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, TOKENS, 6), (2, kv_heads, TOKENS, 6), (2, kv_heads, TOKENS, 10)]
    return tuple(
        (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes
    )


def sight(
    queries: Tensor, keys: Tensor, segments: Tensor | None = None, window: int | None = None
) -> Sight:
    if segments is None:
        return Sight(queries, keys, window=window)
    return Sight(queries, keys, segments[:, queries], segments[:, keys], window)


@CASES
def test_a_part_is_as_the_reference(
    segments: Tensor | None, window: int | None, softcap: float | None, kv_heads: int
) -> None:
    """Tokens in scattered slots; some queries see none of these keys."""
    q, k, v = inputs(kv_heads)
    generator = torch.Generator().manual_seed(1)
    queries = torch.cat([torch.tensor([1]), 2 + torch.randperm(TOKENS - 2, generator=generator)])
    keys = 2 + torch.randperm(TOKENS - 2, generator=generator)[:17]
    q_part, k_part, v_part = q[:, :, queries], k[:, :, keys], v[:, :, keys]
    seen = sight(queries, keys, segments, window)
    result, lse = partial_attention(
        *(x.detach() for x in (q_part, k_part, v_part)), seen, scale=SCALE, softcap=softcap
    )
    wanted, wanted_lse = partial_attention_reference(
        q_part, k_part, v_part, seen, scale=SCALE, softcap=softcap
    )
    torch.testing.assert_close(result, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-12, rtol=1e-12)
    assert torch.isinf(lse).any()


@CASES
def test_parts_merged_are_the_whole_forward_and_backward(
    segments: Tensor | None, window: int | None, softcap: float | None, kv_heads: int
) -> None:
    """Keys in three parts that are not in order, each met alone."""
    q, k, v = inputs(kv_heads)
    expected = attention_reference(
        q, k, v, segments=segments, window=window, scale=SCALE, softcap=softcap
    )
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream)

    q, k, v = (x.detach() for x in (q, k, v))
    slots = torch.arange(TOKENS)
    parts = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2)).split([4, 11, 9])
    result, lse = torch.zeros_like(expected), torch.full(expected.shape[:3], -torch.inf).double()
    for keys in parts:
        seen = sight(slots, keys, segments, window)
        part = partial_attention(
            q, k[:, :, keys], v[:, :, keys], seen, scale=SCALE, softcap=softcap
        )
        result, lse = merge(result, lse, *part)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)

    for_q, for_k, for_v = (torch.zeros_like(x) for x in (q, k, v))
    for keys in parts:
        seen = sight(slots, keys, segments, window)
        gradients = partial_attention_backward(
            upstream,
            result,
            lse,
            q,
            k[:, :, keys],
            v[:, :, keys],
            seen,
            scale=SCALE,
            softcap=softcap,
        )
        for_q += gradients[0]
        for_k[:, :, keys], for_v[:, :, keys] = gradients[1:]
    for gradient, want in zip((for_q, for_k, for_v), wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-11, rtol=1e-11)


@CASES
def test_slotted_attention_is_the_whole_in_any_order(
    segments: Tensor | None, window: int | None, softcap: float | None, kv_heads: int
) -> None:
    q, k, v = inputs(kv_heads)
    expected = attention_reference(
        q, k, v, segments=segments, window=window, scale=SCALE, softcap=softcap
    )
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randperm(TOKENS, generator=generator) for _ in range(2))
    seen = sight(queries, keys, segments, window)
    result = slotted_attention(
        q[:, :, queries],
        k[:, :, keys],
        v[:, :, keys],
        query_slots=queries,
        key_slots=keys,
        query_segments=seen.query_segments,
        key_segments=seen.key_segments,
        window=window,
        scale=SCALE,
        softcap=softcap,
    )
    torch.testing.assert_close(result, expected[:, :, queries], atol=1e-12, rtol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(result, (q, k, v), upstream[:, :, queries])
    wanted = torch.autograd.grad(expected, (q, k, v), upstream)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-11, rtol=1e-11)


def test_what_is_known_beforehand_changes_nothing() -> None:
    q, k, v = (x.detach() for x in inputs())
    later, earlier = torch.arange(TOKENS, 2 * TOKENS), torch.arange(TOKENS)
    for queries, keys, pattern in ((later, earlier, "all"), (earlier, earlier, "causal")):
        told = partial_attention(q, k, v, Sight(queries, keys, pattern=pattern), scale=SCALE)
        found = partial_attention(q, k, v, Sight(queries, keys), scale=SCALE)
        for one, other in zip(told, found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_tiles_that_nothing_sees_are_left_out() -> None:
    slots = torch.arange(TOKENS)
    documents = torch.tensor([[0] * 12 + [1] * 12])

    def scores(*arguments: object, rows: int = 1) -> int:
        tiles = Sight(*arguments).tiles(slice(0, rows))  # type: ignore[arg-type]
        return sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in tiles)

    everything = TOKENS * TOKENS
    assert scores(slots + TOKENS, slots) == everything
    assert scores(slots, slots + TOKENS) == 0
    assert scores(slots + TOKENS, slots, None, None, 3) <= 5 * 3
    assert scores(slots, slots) <= 0.7 * everything
    assert scores(slots, slots, documents, documents) <= 0.5 * everything
    assert scores(slots, slots, documents, documents + 2) == 0


@pytest.mark.parametrize("segments", [None, PACKED])
def test_bf16_scores_are_not_rounded(segments: Tensor | None) -> None:
    q, k, v = (x.detach() for x in inputs())
    q, k, v = (5 * q).bfloat16(), (5 * k).bfloat16(), v.bfloat16()
    slots = torch.arange(TOKENS)
    seen = sight(slots, slots, segments)
    with torch.autocast("cpu", torch.bfloat16):
        result, lse = partial_attention(q, k, v, seen, scale=SCALE)
    exact, exact_lse = partial_attention_reference(
        q.double(), k.double(), v.double(), seen, scale=SCALE
    )
    assert result.dtype == lse.dtype == torch.float32
    assert (result - exact).norm() <= 2**-8 * exact.norm()
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operation_to_the_compiler(dtype: torch.dtype) -> None:
    """With the strides and gradients that torch.library checks."""
    q, k, v = inputs(dtype=dtype)
    slots = torch.arange(TOKENS)
    arguments = (q, k, v, slots, slots, PACKED, PACKED, 9, SCALE, 1.5)
    torch.library.opcheck(torch.ops.trainwright.slotted_attention.default, arguments)
