"""The meter counts what collectives send, in whatever way they are called."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.workers import run_on
from trainwright.comm import collectives
from trainwright.comm.groups import name_group
from trainwright.comm.meter import Meter

FLOAT = 4  # bytes


def one_of_each() -> dict[str, dict[str, float]]:
    rank, n = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(n)))
    name_group(group, "tp")
    x = torch.ones(12, 10)
    with Meter() as meter:
        dist.all_reduce(x, group=group)
        dist.all_reduce(x, group=group, async_op=True).wait()
        dist.all_gather_into_tensor(torch.empty(12 * n, 10), x, group=group)
        dist.all_gather([torch.empty_like(x) for _ in range(n)], x, group=group)
        dist.reduce_scatter_tensor(torch.empty(12 // n, 10), x, group=group)
        dist.all_to_all_single(torch.empty_like(x), x, group=group)
        splits = [1, *[0] * (n - 2), 11]
        received = [splits[rank]] * n
        dist.all_to_all_single(torch.empty(sum(received), 10), x, received, splits, group=group)
        dist.broadcast(x, 0, group=group)
        dist.barrier(group=group)
        right, left = (rank + 1) % n, (rank - 1) % n
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, right, group),
                dist.P2POp(dist.irecv, torch.empty_like(x), left, group),
            ]
        )
        for work in works:
            work.wait()
        totals = meter.step()
        assert meter.step() == {}
    dist.all_reduce(x, group=group)
    assert meter.step() == {}, "switched off"
    assert list(totals) == ["tp"]
    traffic = totals["tp"]
    return {"bytes": traffic.bytes_by_collective, "calls": traffic.calls, "time": traffic.seconds}


@pytest.mark.parametrize("n", [2, 4])
def test_each_collective_sends_what_its_ring_sends(n):
    whole = 12 * 10 * FLOAT
    for rank, found in enumerate(run_on(n, one_of_each)):
        kept = {0: 1, n - 1: 11}.get(rank, 0)  # rows of the uneven exchange that stay here
        assert found["bytes"] == {
            "all_reduce": 2 * 2 * (n - 1) / n * whole,
            "all_gather": 2 * (n - 1) * whole,
            "reduce_scatter": (n - 1) / n * whole,
            "all_to_all": (n - 1) / n * whole + whole * (12 - kept) / 12,
            "broadcast": (n - 1) / n * whole,
            "barrier": 0,
            "send": whole,
            "receive": 0,
        }
        assert found["calls"] == 11
        assert found["time"] > 0


def sharded_step() -> tuple[int, dict[str, float], dict[str, float]]:
    """Bytes of an FSDP2 step, and of a DTensor made whole, which calls functional collectives."""
    n = dist.get_world_size()
    group = dist.new_group(list(range(n)))
    name_group(group, "fsdp")
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("fsdp",))
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Meter() as meter:
        model(torch.ones(2, 16)).sum().backward()
        step = dict(meter.step()["fsdp"].bytes_by_collective)
        DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)]).full_tensor()
        whole = dict(meter.step()["fsdp"].bytes_by_collective)
    return 16 * 16 * FLOAT, step, whole


def test_fsdp_and_dtensor_are_seen():
    for weight, step, whole in run_on(2, sharded_step):
        # Both weights forward; backward again, each gradient once. Half of each is another's.
        assert step["all_gather"] == 2 * 2 * weight / 2
        assert step["reduce_scatter"] == 2 * weight / 2
        assert whole == {"all_gather": 3 * 4 * FLOAT}


def through_autograd() -> tuple[dict[str, float], dict[str, float]]:
    group = dist.new_group(list(range(dist.get_world_size())))
    name_group(group, "cp")
    x = torch.ones(4, 6, requires_grad=True)
    with Meter() as meter:
        y = collectives.gather(x, 1, group)
        forward = meter.step()["cp"].bytes_by_collective
        y.sum().backward()
        backward = meter.step()["cp"].bytes_by_collective
    return forward, backward


def test_backward_passes_are_seen():
    for forward, backward in run_on(2, through_autograd):
        assert forward == {"all_gather": 4 * 6 * FLOAT}
        assert backward == {"reduce_scatter": 4 * 6 * FLOAT}


def wrong_arguments() -> str:
    with Meter() as meter:
        try:
            dist.all_reduce(torch.ones(2), grup=None)
        except TypeError as error:
            return f"{error} {meter.step()}"
    return "nothing raised"


def test_torch_itself_complains_of_wrong_arguments():
    for text in run_on(2, wrong_arguments):
        assert "grup" in text and text.endswith("{}")
