"""Grouped products: each group of rows times a matrix of its own, as a mixture of experts needs.

Rows of one group lie together. `group_rows` brings a token's copies to the experts that it goes to
and `ungroup_rows` sums what comes back; both directions of both are plain gathers, so that results
do not depend on the order in which threads add.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_GROUPED = hasattr(F, "grouped_mm")
_GROUPED_TYPES = {
    "cpu": (torch.float32,),  # for narrow types see `rounded`
    "cuda": (torch.bfloat16,),
}
_ALIGNMENT = 16  # bytes, of rows and addresses


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The next `counts[g]` rows of x times weight[g] transposed, for every group g in turn.

    x [rows, in], weight [groups, out, in], counts int64 [groups], which add up to the rows; any of
    them may be 0. Returns [rows, out], in autocast's type where that is on.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        x, weight = x.to(narrow), weight.to(narrow)
    return _multiply(x, weight, counts)


def grouped_linear_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear`, one row at a time; for tests."""
    groups = torch.arange(len(counts)).repeat_interleave(counts.cpu()).tolist()
    rows = [weight[group] @ row for group, row in zip(groups, x, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def count_groups(groups: Tensor, number: int) -> Tensor:
    """How many elements of int64 `groups` are 0, 1, … number - 1; int64 [number]."""
    flat = groups.flatten()
    # A fixed shape and no wait for the device, unlike bincount.
    return torch.zeros(number, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def group_rows(x: Tensor, order: Tensor, copies: int) -> Tensor:
    """`copies` of each row of x [tokens, channels], in the order `order` [tokens · copies].

    order is a permutation; its entry j stands for row j // copies.
    """
    return _GroupRows.apply(x, order, copies)


def ungroup_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows; takes back `group_rows`' order.

    rows [tokens · copies, channels], weights [tokens, copies] in fp32, which are rounded to the
    type of `rows`, as is the result [tokens, channels].
    """
    return _UngroupRows.apply(rows, order, weights)


def permute_rows(rows: Tensor, order: Tensor) -> Tensor:
    """rows[order] for a permutation; its gradient is permuted back."""
    return _Permute.apply(rows, order, inverse_permutation(order))


def inverse_permutation(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, int64 [rows]."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


class _GroupRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [order], [gradient] = ctx.saved_tensors, gradients
        back = gradient[inverse_permutation(order)]
        return back.view(-1, ctx.copies, gradient.shape[-1]).sum(1), None, None


class _UngroupRows(torch.autograd.Function):
    """Keeps the rows as they lie, so that one gather serves both gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        back = rows[inverse_permutation(order)].view(*weights.shape, -1)
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), back).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, order, weights = ctx.saved_tensors
        spread = gradients[0][order // weights.shape[1]]
        for_weights = (rows * spread).sum(-1, dtype=weights.dtype)[inverse_permutation(order)]
        own = weights.to(rows.dtype).flatten()[order]
        return spread * own.unsqueeze(1), None, for_weights.view_as(weights)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [inverse] = ctx.saved_tensors
        return gradients[0][inverse], None, None


@torch.library.custom_op("trainwright::grouped_linear", mutates_args=())
def _multiply(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _rows_by_matrices(x, weight.transpose(1, 2), counts)


@torch.library.custom_op("trainwright::grouped_linear_backward", mutates_args=())
def _multiply_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, counts: Tensor, for_weight: bool
) -> tuple[Tensor, Tensor]:
    gradient = gradient.contiguous()  # grouped_mm takes no expanded ones
    for_x = _rows_by_matrices(gradient, weight, counts)
    if not for_weight:
        return for_x, weight.new_empty(0)
    if _fits(gradient, x):
        return for_x, F.grouped_mm(gradient.t(), x, offs=_ends(counts))
    result = torch.zeros_like(weight)
    for group, part in _parts(counts):
        rows, own = rounded(gradient, part), rounded(x, part)
        torch.mm(rows.t(), own, out=result[group])
    return for_x, result


def _rows_by_matrices(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows of x [rows, in] times its matrix of [groups, in, out]."""
    x = x.contiguous()
    if _fits(x, matrices):
        return F.grouped_mm(x, matrices, offs=_ends(counts))
    result = x.new_empty(x.shape[0], matrices.shape[2])
    for group, part in _parts(counts):
        rows = rounded(x, part)
        if len(rows) == part.stop - part.start:
            torch.mm(rows, matrices[group], out=result[part])
        else:
            result[part] = torch.mm(rows, matrices[group])[: part.stop - part.start]
    return result


def _parts(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and where these lie."""
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            yield group, slice(start, start + count)
        start += count


def rounded(x: Tensor, part: slice) -> Tensor:
    """Rows `part` of x, on CPU in a narrow type with rows of zeros up to a rounder number.

    There PyTorch's products (oneDNN) compile code for every new number of rows and keep it: 500 MB
    after a hundred steps of a small model. An eighth of rows more leaves few different numbers.
    """
    rows = x[part]
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return rows
    step = max(8, 1 << max(len(rows).bit_length() - 4, 0))
    return F.pad(rows, (0, 0, 0, -len(rows) % step))


def _fits(*tensors: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these: it wants narrow types and aligned rows.

    On CPU (2 threads, fp32, 8 to 64 groups) it takes 0.7 to 0.95 of a loop's time.
    """
    first = tensors[0]
    return (
        _HAS_GROUPED
        and first.shape[0] > 0
        and first.dtype in _GROUPED_TYPES.get(first.device.type, ())
        and all(tensor.dtype == first.dtype for tensor in tensors)
        and all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)
        and all(
            size * tensor.element_size() % _ALIGNMENT == 0
            for tensor in tensors
            for size in tensor.shape[1:]
        )
    )


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


@_multiply.register_fake
def _like_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_multiply_backward.register_fake
def _like_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, counts: Tensor, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight) if for_weight else weight.new_empty(0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    for_x, for_weight = _multiply_backward(gradient, x, weight, counts, wanted)
    return for_x, for_weight if wanted else None, None


_multiply.register_autograd(_differentiate, setup_context=_remember)
