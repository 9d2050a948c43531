"""Unequal devices: every pool works as long as the others, where the way between them allows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planner.search.machines import (
    FAR,
    FAST,
    LLAMA_8B,
    SLOW,
    cluster,
    llama,
    pool,
)
from trainwright.planner.cluster.catalogue import device, link
from trainwright.planner.cluster.describe import Cluster, Pool
from trainwright.planner.cost.prediction import Interval, MemoryPrediction, Prediction
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.legality import is_legal
from trainwright.planner.search.asked import like_of
from trainwright.planner.search.devices import arrangements, launched_ranks, orders
from trainwright.planner.search.frontier import NOISE
from trainwright.planner.search.grid import make_grid
from trainwright.planner.search.ranking import rank
from trainwright.planner.search.stage_costs import model_seconds, stage_costs, with_split_layers

JOB = Job(LLAMA_8B, 4096, 256)
BOTH = cluster(pool(), pool("slow", SLOW))


def seconds(ranked):
    return ranked.prediction.step_seconds.value


def test_two_pools_of_speeds_one_and_three():
    """Within 5 % of work that could be divided at will, and much quicker than equal shares."""
    alone = [seconds(rank(JOB, replace(BOTH, pools=(each,)), top=1).winner) for each in BOTH.pools]
    assert alone[1] / alone[0] == pytest.approx(3, rel=0.05)
    bound = 1 / sum(1 / each for each in alone)
    found = rank(JOB, BOTH).winner
    assert seconds(found) <= 1.05 * bound
    # The best plan of as many equal devices, on these.
    even = rank(JOB, cluster(pool(nodes=2)), top=1).winner.plan
    assert not even.rows_by_replica
    assert 1.5 * seconds(found) <= predict(JOB, even, BOTH).step_seconds.value
    assert found.prediction.memory.fits


def test_layers_along_a_pipeline_follow_speed():
    """Where the way between pools is slow a pipeline is chosen, whose stages take equally long."""
    job = replace(JOB, batch_sequences=128)
    found = rank(job, replace(BOTH, wide=replace(FAR, up=12e9, down=12e9, latency=1e-3))).winner
    plan = found.plan
    assert plan.pp > 1 and len(found.cluster.pools) == 2
    times = stage_costs(job, plan, found.cluster)
    ends = [sum(plan.stage_layers[:n]) for n in range(plan.pp + 1)]
    taken = [times.taken[n, ends[n], ends[n + 1]] for n in range(plan.pp)]
    assert max(taken) < 1.5 * sum(taken) / len(taken)
    even = replace(plan, stage_layers=(32 // plan.pp,) * plan.pp)
    assert seconds(found) < 0.8 * predict(job, even, found.cluster).step_seconds.value


def test_a_pool_that_is_too_far_away_is_left_out():
    found = rank(JOB, replace(BOTH, wide=replace(FAR, up=1e6, down=1e6))).winner
    assert [each.name for each in found.cluster.pools] == ["fast"]
    assert seconds(found) == seconds(rank(JOB, replace(BOTH, pools=BOTH.pools[:1])).winner)


def test_arrangements_are_of_devices_that_there_are():
    three = cluster(pool("a", nodes=2), pool("b", SLOW, 3), pool("c", FAST, 1, 4), wide=FAR)
    like = like_of(JOB, three)
    found = list(arrangements(JOB, three, like, {}, saves=False))
    kinds = {tuple(each.given) for each in found}
    assert kinds == {(), ("pp", "virtual_stages"), ("pp", "dp_replicate", "rows_by_replica")}
    used = {frozenset(part.name for part in each.cluster.pools) for each in found}
    assert len(used) == 7  # every set of pools
    speeds = {each.name: 1 / model_seconds(JOB, like, each) for each in three.pools}
    for each in found:
        assert each.world == each.cluster.devices
        for there in three.pools:
            parts = [part for part in each.cluster.pools if part.name == there.name]
            assert sum(part.nodes for part in parts) <= there.nodes
        if rows := each.given.get("rows_by_replica"):
            assert sum(rows) == JOB.batch_sequences
            # A replica's devices are all of one pool, in every stage, and its rows by its speed.
            pp, own = each.given["pp"], each.world // each.given["pp"] // len(rows)
            names = []
            for index in range(len(rows)):
                starts = [s * each.world // pp + index * own for s in range(pp)]
                there = {each.cluster.pool_of(r + n).name for r in starts for n in range(own)}
                assert len(there) == 1
                names.append(there.pop())
            by_speed = sorted(zip((speeds[name] for name in names), rows, strict=True))
            assert [many for _, many in by_speed] == sorted(rows)
        elif "pp" in each.given:
            block = each.world // each.given["pp"]
            for first in range(0, each.world, block):
                there = {each.cluster.pool_of(first + n).name for n in range(block)}
                assert len(there) == 1


def test_degrees_that_are_given_are_kept_on_unequal_devices():
    like = like_of(JOB, BOTH)
    fixed = {"pp": 2, "dp_replicate": 2, "world_size": 16}
    found = list(arrangements(JOB, BOTH, like, fixed, saves=False))
    assert found
    for each in found:
        assert each.world == 16
        rows = each.given.get("rows_by_replica", ())
        grid = make_grid(replace(like, rows_by_replica=rows), [16], {**fixed, **each.given})
        for index in range(len(grid)):
            candidate = grid.candidate(index)
            assert (candidate.pp, candidate.dp_replicate) == (2, 2)
            assert is_legal(candidate)


def test_the_order_of_pools_follows_the_cost_model():
    """One that wants the slow pool first is obeyed, though it has less memory."""
    small = replace(SLOW, memory_bytes=60e9)
    machine = cluster(pool(), pool("slow", small))

    def memory(job, plan, cluster):
        return MemoryPrediction(Interval.around(1e9, 0.1), 80e9)

    def foretell(job, plan, cluster):
        names = [each.name for each in cluster.pools]
        taken = Interval.around(0.5 if names == ["slow", "fast"] else 1.0, 0.1)
        sums = memory(job, plan, cluster)
        return Prediction(plan, taken, sums, 1.0, {}, 0, 0, 0, 1e12, 1e12, 1.0, 1.0, 1.0)

    found = rank(JOB, machine, fixed={"pp": 2}, predict=foretell, predict_memory=memory).winner
    assert [each.name for each in found.cluster.pools] == ["slow", "fast"]
    assert launched_ranks(machine, found.cluster) == (*range(8, 16), *range(8))
    assert len(list(orders(found.cluster))) == 1


def test_a_head_heavy_model_has_fewer_layers_on_its_last_stage():
    """A head that takes as long as some layers; the split is simulated to be quicker."""
    job = Job(llama(1024, 12, 8, 8, 2816, 64000), 2048, 64)
    machine = cluster(pool(devices=4))
    grid = make_grid(like_of(job, machine), [4], {"pp": 4, "schedule": "1f1b", "micro_batch": 1})
    plan = grid.candidate(0).plan(threads=1, compile=True)
    split = with_split_layers(job, plan, machine)
    assert split.stage_layers[-1] == min(split.stage_layers) < max(split.stage_layers)
    even = replace(plan, stage_layers=(3, 3, 3, 3))
    step = predict(job, split, machine).step_seconds.value
    assert step < 0.8 * predict(job, even, machine).step_seconds.value
    assert step <= predict(job, plan, machine).step_seconds.value * (1 + NOISE)


def test_three_kinds_in_three_regions():
    """Two hundred devices; at least as good as the best of the pools alone."""

    def region(name, kind, nodes, inside, between):
        return Pool(name, device(kind), nodes, 8, link(inside), link(between), region=name)

    pools = (
        region("eu", "H100-SXM", 8, "NVLink-4", "InfiniBand-NDR"),
        region("us", "A100-80G-SXM", 8, "NVLink-3", "InfiniBand-NDR"),
        region("asia", "RTX-4090", 9, "PCIe-4", "Ethernet-25"),
    )
    machine = Cluster("world", pools, wide=FAR)
    assert machine.devices == 200
    found = rank(JOB, machine, predictions=32)
    alone = rank(JOB, replace(machine, pools=pools[:1]), top=1, predictions=32)
    assert seconds(found.winner) <= seconds(alone.winner) * (1 + NOISE)
    assert found.considered > 100_000
