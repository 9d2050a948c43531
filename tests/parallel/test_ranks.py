"""Which worker takes which place of the grid, where the plan says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.workers import run_on
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan

AXES = ("pp", "dp_replicate", "dp_shard")


def place(plan: Plan) -> tuple[int, ...]:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    mesh = Mesh(plan, world)
    return (*(mesh.index(axis) for axis in AXES), *mesh.ranks("pp"))


def plan_of(ranks: tuple[int, ...], **degrees: int) -> Plan:
    return replace(Plan.alone(), world_size=4, ranks=ranks, **degrees)


def test_two_pools_of_two_workers_each_have_a_pipeline_of_their_own() -> None:
    """The grid has both pools' first workers on stage 0; the launcher numbers pool by pool."""
    places = run_on(4, place, plan_of((0, 2, 1, 3), pp=2, dp_replicate=2))
    assert places == [(0, 0, 0, 0, 1), (1, 0, 0, 0, 1), (0, 1, 0, 2, 3), (1, 1, 0, 2, 3)]


def test_a_pipeline_begins_on_the_second_pool() -> None:
    places = run_on(4, place, plan_of((2, 3, 0, 1), pp=2, dp_shard=2))
    assert places == [(1, 0, 0, 2, 0), (1, 0, 1, 3, 1), (0, 0, 0, 2, 0), (0, 0, 1, 3, 1)]


def test_shards_stand_in_the_order_of_their_ranks() -> None:
    with pytest.raises(ValueError, match="ranks descend"):
        run_on(4, place, plan_of((1, 0, 3, 2), dp_replicate=2, dp_shard=2))
