"""Joules, dollars and grams by hand, and as they must rise and fall."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool
from trainwright.planner.cost.energy import Load, energy_of, load_energy, power
from trainwright.planner.cost.stage import Work
from trainwright.planner.plan import Plan

LINK = Link("link", 1e-6, 1e9, 1e9)
GPU = DeviceKind("GPU", "cuda", 80e9, {"bf16": 1e15}, 3e12, watts=700, idle_watts=100, units=100)
OLD = replace(GPU, name="old", watts=300, idle_watts=50)
NORTH = Pool("north", GPU, 2, 4, LINK, LINK, dollars_per_hour=3.0, grams_per_kwh=30.0)
SOUTH = Pool("south", OLD, 1, 8, LINK, LINK, dollars_per_hour=1.0, grams_per_kwh=600.0)
WORK = Work(products=3.0, attention=1.0, elements=2.0, exposed={"tp": 0.5, "fsdp": 0.5})


def plan_on(workers: int) -> Plan:
    return replace(Plan.alone("cuda"), world_size=workers, dp_replicate=workers)


def test_power_lies_between_rest_and_the_greatest() -> None:
    assert [power(GPU, share) for share in (0, 0.5, 1)] == [100, 400, 700]


def test_a_step_by_hand() -> None:
    """4 s at 700 W, 3 s at 460 W with the update, 1 s at 340 W, and 2 s of waiting at 190 W."""
    found = energy_of(plan_on(8), Cluster("one", (NORTH,)), 10.0, WORK, optimizer=1.0)
    one = 4 * 700 + 3 * 460 + 1 * 340 + 2 * 190
    assert found.joules == pytest.approx(8 * one)
    assert found.dollars == pytest.approx(8 * 3.0 * 10 / 3600)
    assert found.grams == pytest.approx(1.2 * 8 * one / 3.6e6 * 30)


def test_only_the_devices_that_take_part_count_each_by_its_pool() -> None:
    cluster = Cluster("two", (NORTH, SOUTH))
    north = energy_of(plan_on(8), Cluster("north", (NORTH,)), 10.0, WORK)
    south = energy_of(plan_on(3), Cluster("south", (SOUTH,)), 10.0, WORK)
    both = energy_of(plan_on(11), cluster, 10.0, WORK)
    for name in ("joules", "dollars", "grams"):
        assert getattr(both, name) == pytest.approx(getattr(north, name) + getattr(south, name))
    assert energy_of(plan_on(8), cluster, 10.0, WORK) == north


def test_waiting_costs_more_than_nothing_and_less_than_working() -> None:
    def joules(seconds: float, **work: float) -> float:
        return load_energy([Load(NORTH, 1, **work)], seconds).joules

    kinds = ("products", "elements", "communication")
    draws = [joules(1.0, **{kind: 1.0}) for kind in kinds] + [joules(1.0)]
    assert draws == sorted(draws, reverse=True) and len(set(draws)) == 4
    assert draws[-1] > GPU.idle_watts
    assert joules(2.0, products=1.0) == pytest.approx(draws[0] + draws[-1])


def test_a_usual_step_draws_what_was_measured_of_nodes_in_training() -> None:
    """arXiv:2506.14551: 76 % of the rated power; within a tenth of it either way."""
    found = load_energy([Load(NORTH, 1, products=0.6, elements=0.2, communication=0.1)], 1.0)
    assert 0.68 < found.joules / GPU.watts < 0.84
