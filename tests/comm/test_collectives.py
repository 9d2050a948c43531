"""Gathering and summing by messages, against gloo's own collectives and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.workers import run_on
from trainwright.comm.collectives import gather, gather_plain, scatter_sum, scatter_sum_plain


def rows(rank: int, workers: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 2 * workers, 5, generator=generator, dtype=torch.float64).to(dtype)


def made(dtype: torch.dtype) -> dict[str, Tensor]:
    """On a worker: our ways, and gloo's own all-gather."""
    own, group = rows(dist.get_rank(), dist.get_world_size(), dtype), dist.group.WORLD
    whole = own.new_empty(dist.get_world_size() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(whole, own)
    return {
        "gloo": whole,
        "first": gather_plain(own, 0, group),
        "last": gather_plain(own, -1, group),
        "sum": scatter_sum_plain(own, 1, group),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workers", [2, 4])
def test_messages_give_what_gloo_gives(workers: int, dtype: torch.dtype) -> None:
    inputs = [rows(rank, workers, dtype) for rank in range(workers)]
    # Summed in rank order, rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    total = inputs[0].to(wide)
    for other in inputs[1:]:
        total = total + other.to(wide)
    for rank, got in enumerate(run_on(workers, made, dtype)):
        assert got["first"].equal(got["gloo"]) and got["gloo"].equal(torch.cat(inputs))
        assert got["last"].equal(torch.cat(inputs, -1))
        assert got["sum"].equal(total.to(dtype)[:, 2 * rank : 2 * rank + 2])
        exact = torch.stack([x.double() for x in inputs]).sum(0)[:, 2 * rank : 2 * rank + 2]
        torch.testing.assert_close(got["sum"].double(), exact, rtol=2**-7, atol=1e-6)


def both_ways() -> tuple[Tensor, Tensor]:
    """On a worker: gradients through a gather and through a scattered sum."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    own = rows(rank, workers, torch.float64).requires_grad_()
    joined = gather(own, 0, dist.group.WORLD)
    (joined * (rank + 1)).sum().backward()
    gathered = own.grad
    own.grad = None
    (scatter_sum(own, 1, dist.group.WORLD) * (rank + 1)).sum().backward()
    assert gathered is not None and own.grad is not None
    return gathered, own.grad


def test_gradients_go_the_way_back() -> None:
    for gathered, scattered in run_on(4, both_ways):
        assert gathered.equal(torch.full_like(gathered, 1.0 + 2 + 3 + 4))
        for rank in range(4):
            part = scattered[:, 2 * rank : 2 * rank + 2]
            assert part.equal(torch.full_like(part, rank + 1.0))
