"""Grouped products and the gathers around them against plain loops."""

from __future__ import annotations

import pytest
import torch

from trainwright.kernels.grouped import (
    count_groups,
    group_rows,
    grouped_linear,
    grouped_linear_reference,
    permute_rows,
    rounded,
    ungroup_rows,
)

# Aligned shapes go to PyTorch's grouped product, odd ones and fp64 to the loop.
SHAPES = [(8, 16), (7, 5), (8, 5)]
COUNTS = [[3, 0, 6], [0, 0, 0], [0, 9, 0], [1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_products_and_gradients(
    out: int, width: int, counts: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), width, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, out, width, dtype=dtype, requires_grad=True)
    upstream = torch.randn(sum(counts), out, dtype=dtype)
    results = []
    for product in (grouped_linear, grouped_linear_reference):
        result = product(x, weight, torch.tensor(counts))
        for_x, for_weight = torch.zeros_like(x), torch.zeros_like(weight)
        if len(x):
            for_x, for_weight = torch.autograd.grad(result, (x, weight), upstream)
        results.append((result, for_x, for_weight))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_an_unused_group_has_a_zero_gradient() -> None:
    """Not none at all: sharded weights wait for every worker's gradient."""
    weight = torch.randn(3, 8, 16, requires_grad=True)
    grouped_linear(torch.randn(0, 16), weight, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


def test_expanded_gradients_are_taken() -> None:
    """PyTorch's own backward refuses what `sum` sends back."""
    x = torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(2, 8, 16, requires_grad=True)
    grouped_linear(x, weight, torch.tensor([1, 3])).sum().backward()
    groups = torch.tensor([0, 1, 1, 1])
    torch.testing.assert_close(x.grad, weight.detach()[groups].sum(1))


def test_autocast_narrows_and_gradients_come_back_wide() -> None:
    x, weight = torch.randn(4, 16), torch.randn(2, 8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = grouped_linear(x, weight, torch.tensor([1, 3]))
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("counts", [[3, 0, 70], [0, 0, 1], [129, 16, 8]], ids=str)
def test_narrow_types(counts: list[int]) -> None:
    """On CPU their rows are rounded up, which no result shows."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 12).bfloat16().requires_grad_()
    weight = torch.randn(3, 20, 12).bfloat16().requires_grad_()
    upstream = torch.randn(sum(counts), 20).bfloat16()
    result = grouped_linear(x, weight, torch.tensor(counts))
    ours = (result, *torch.autograd.grad(result, (x, weight), upstream))
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    result = grouped_linear_reference(x, weight, torch.tensor(counts))
    theirs = (result, *torch.autograd.grad(result, (x, weight), upstream.double()))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-2)


def test_few_numbers_of_rows_reach_the_narrow_product() -> None:
    """PyTorch keeps compiled code for each of them."""
    x = torch.zeros(1024, 1, dtype=torch.bfloat16)
    sizes = {len(rounded(x, slice(0, count))) for count in range(1, 1025)}
    assert len(sizes) < 64
    for count in range(64, 1025):
        assert count <= len(rounded(x, slice(0, count))) <= count * 1.125
    wide = x.float()
    assert len(rounded(wide, slice(3, 20))) == 17


def test_a_weight_that_is_not_trained_gets_no_gradient() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(2, 8, 16)
    grouped_linear(x, weight, torch.tensor([1, 3])).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_rows_go_out_and_come_back() -> None:
    torch.manual_seed(0)
    tokens, copies, groups = 11, 3, 4
    picks = torch.randint(0, groups, (tokens, copies))
    order = picks.flatten().argsort(stable=True)
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, copies, dtype=torch.float64, requires_grad=True)
    scales = torch.arange(1.0, groups + 1, dtype=torch.float64)

    rows = group_rows(x, order, copies) * scales[picks.flatten()[order]].unsqueeze(1)
    result = ungroup_rows(rows, order, weights)
    expected = x * (weights * scales[picks]).sum(1, keepdim=True)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(result)
    for ours, theirs in zip(
        torch.autograd.grad(result, (x, weights), upstream),
        torch.autograd.grad(expected, (x, weights), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert (
        count_groups(picks, groups).tolist()
        == torch.bincount(picks.flatten(), minlength=groups).tolist()
    )


def test_a_permutation_and_its_gradient() -> None:
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([4, 0, 5, 1, 2, 3])
    assert torch.equal(permute_rows(rows, order), rows[order])
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, order), rows)


def test_compiled_blocks_keep_it_whole() -> None:
    def both(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x, weight, counts).relu()

    x, weight = torch.randn(4, 16), torch.randn(2, 8, 16)
    counts = torch.tensor([1, 3])
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, counts), both(x, weight, counts))
