"""Where groups lie on a machine, against looking at every group, and every member, by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.cluster.topology import GROUPS, Route, boundary, route
from trainwright.planner.plan import Plan

DEVICE = DeviceKind("d", "cuda", 80e9, {"bf16": 1e15}, 3e12, 700, 70, 132)
NEAR, FAR = Link("near", 1e-6, 400e9, 400e9), Link("far", 2e-6, 50e9, 40e9)
SHARED = Link("one card", 3e-6, 10e9, 10e9, shared=True)
SPINE = Link("spine", 5e-6, 20e9, 20e9)
REACHED = Rates().networks
WIDE = Link("wide", 40e-3, 5e9, 1e9, shared=True)


def pool(name: str, nodes: int, devices: int, **fields) -> Pool:
    values = {"inside": NEAR, "between": FAR, **fields}
    return Pool(name, DEVICE, nodes, devices, **values)


ONE = Cluster("one", (pool("a", 6, 8),))
RACKS = Cluster("racks", (pool("a", 12, 4, nodes_per_rack=3, between_racks=SPINE),))
POOLS = Cluster(
    "pools",
    (pool("a", 2, 8), pool("b", 4, 4, between=SHARED), pool("c", 3, 6)),
    {frozenset("ab"): SPINE},
    WIDE,
)

# The first pool and the last are joined by the slow way only, which no neighbours take.
CHAIN = Cluster("chain", POOLS.pools, {frozenset("ab"): SPINE, frozenset("bc"): SPINE}, WIDE)


def plan_of(pp=1, replicas=1, shards=1, cp=1, tp=1, ep=1) -> Plan:
    return Plan(
        world_size=pp * replicas * shards * cp * tp,
        dp_replicate=replicas,
        dp_shard=shards,
        micro_batch=1,
        accumulation=8,
        threads=1,
        precision="bf16",
        recompute="none",
        compile=False,
        device="cuda",
        sequence_length=1024,
        optimizer="adamw",
        pp=pp,
        cp=cp,
        tp=tp,
        ep=ep,
    )


def groups_of(plan: Plan, name: str, pp_rank: int | None = None) -> list[list[int]]:
    """The groups as the mesh makes them: a grid of ranks, its other axes brought to the front.

    Of one pipeline rank, or of all (None).
    """
    shape = (plan.pp, plan.dp_replicate, plan.dp_shard // plan.ep, plan.ep, plan.cp, plan.tp)
    order = ("pp", "dp_replicate", "outer", "ep", "cp", "tp")
    grid = np.arange(plan.world_size).reshape(shape)
    inner = [order.index(axis) for axis in order if axis in GROUPS[name]]
    outer = [axis for axis in range(6) if axis not in inner]
    count = int(np.prod([shape[axis] for axis in inner]))
    groups = grid.transpose(*outer, *inner).reshape(-1, count).tolist()
    block = plan.world_size // plan.pp
    return [ranks for ranks in groups if pp_rank in (None, ranks[0] // block)]


def places(cluster: Cluster, world: int) -> list[tuple[int, int, int, int]]:
    """Pool, rack, node and device of each rank, counted one by one."""
    found = []
    for number, each in enumerate(cluster.pools):
        for node in range(each.nodes):
            rack = node // each.nodes_per_rack if each.nodes_per_rack else 0
            found += [(number, rack, node, device) for device in range(each.devices_per_node)]
    return found[:world]


def expected(
    cluster: Cluster, plan: Plan, name: str, pp_rank: int | None = None
) -> dict[str, object]:
    """The worst of all groups, each looked at by itself."""
    where = places(cluster, plan.world_size)
    crowd = {
        key: len(list(ranks))
        for depth in (1, 3)
        for key, ranks in itertools.groupby(place[:depth] for place in where)
    }
    levels = []
    for depth in (3, 2, 1, 0):  # places are told by the first depth + 1 numbers
        hops = fan = peers = 0
        each = together = float("inf")
        latency = 0.0
        for ranks in groups_of(plan, name, pp_rank):
            own = [where[rank] for rank in ranks]
            inner = [place[: depth + 1] for place in own]
            outer = [place[:depth] for place in own]
            hops = max(hops, len(set(inner)) - len(set(outer)))
            for here in set(inner):
                others = {place for place in inner if place[:-1] == here[:-1]}
                members = inner.count(here)
                fan = max(fan, len(others))
                peers = max(peers, outer.count(here[:-1]) - members)
                if len(others) == 1:
                    continue
                a = cluster.pools[here[0]]
                if depth:
                    links = [(a.inside, a.between, a.between_racks or a.between)[3 - depth]]
                    talking = max(crowd[o[:3]] for o in own if o[: depth + 1] == here)
                else:
                    row = sorted(others)
                    at = row.index(here)
                    near = {row[at - 1], row[(at + 1) % len(row)]} - {here}
                    links = [cluster.link(a.name, cluster.pools[n].name) for (n,) in near]
                    talking = crowd[here]
                for link in links:
                    rate = a.rates.links if depth == 3 else a.rates.networks
                    share = rate * link.bandwidth / (talking if link.shared else 1)
                    latency = max(latency, link.latency)
                    each, together = min(each, share), min(together, share * members)
        if hops:
            levels.append((depth == 3, latency, each, together, fan, hops, peers))
    nodes = [{where[rank][:3] for rank in ranks} for ranks in groups_of(plan, name, pp_rank)]
    return {"nodes": max(map(len, nodes)), "levels": levels}


def found(way: Route) -> dict[str, object]:
    levels = [
        (
            e.near,
            e.latency,
            pytest.approx(e.each),
            pytest.approx(e.together),
            e.fan,
            e.hops,
            e.peers,
        )
        for e in way.levels
    ]
    return {"nodes": way.nodes, "levels": levels}


CASES = [
    (ONE, plan_of(pp=3, replicas=2, shards=4, tp=2)),
    (ONE, plan_of(shards=12, cp=2, tp=2, ep=4)),
    (ONE, plan_of(pp=2, shards=3, tp=8)),
    (ONE, plan_of(shards=7, tp=6)),  # groups that straddle nodes
    (RACKS, plan_of(shards=12, tp=4)),
    (RACKS, plan_of(pp=2, replicas=3, shards=4, tp=2)),
    (RACKS, plan_of(pp=6, shards=8)),
    (POOLS, plan_of(replicas=5, shards=5, tp=2)),
    (POOLS, plan_of(pp=5, shards=5, tp=2)),
    (POOLS, plan_of(shards=50)),
    (CHAIN, plan_of(replicas=2, shards=25)),
    (POOLS, plan_of(pp=2, replicas=3, cp=2, tp=4)),
]


@pytest.mark.parametrize(("cluster", "plan"), CASES)
@pytest.mark.parametrize("name", list(GROUPS))
def test_routes_are_the_worst_of_all_groups(cluster, plan, name):
    assert found(route(cluster, plan, name)) == expected(cluster, plan, name)


@pytest.mark.parametrize(("cluster", "plan"), [case for case in CASES if case[1].pp > 1])
@pytest.mark.parametrize("name", ["tp", "fsdp", "dp_replicate", "replicas"])
def test_a_pipeline_rank_sees_its_own_groups_alone(cluster, plan, name):
    for rank in range(plan.pp):
        assert found(route(cluster, plan, name, rank)) == expected(cluster, plan, name, rank)


def test_a_stage_on_a_fast_pool_does_not_pay_for_the_slow_one():
    plan = plan_of(pp=5, shards=5, tp=2)
    first, last = (route(POOLS, plan, "fsdp", rank) for rank in (0, 4))
    assert first.nodes == 2 and first.levels[-1].each == pytest.approx(REACHED * 40e9)
    assert boundary(POOLS, plan, 0, 1).levels[-1].link == "spine"
    assert boundary(POOLS, plan, 1, 2).levels[-1].link == "spine"
    assert boundary(POOLS, plan, 3, 4).levels[-1].link == "wide"
    assert last.pools == 1 and last.levels[-1].link == "far"


def test_one_network_card_is_shared_by_the_groups_of_a_node():
    cluster = Cluster("c", (pool("a", 4, 8, between=SHARED),))
    apart, together = plan_of(shards=4, tp=8), plan_of(shards=32)
    one, all_of_it = route(cluster, apart, "fsdp"), route(cluster, together, "fsdp")
    assert (one.sharers, one.levels[-1].together) == (8, pytest.approx(REACHED * 10e9 / 8))
    assert (all_of_it.sharers, all_of_it.levels[-1].together) == (1, pytest.approx(REACHED * 10e9))


def test_more_workers_than_devices():
    with pytest.raises(IndexError, match="64 workers on 48 devices"):
        route(ONE, plan_of(shards=64), "fsdp")


def test_pools_that_nothing_joins():
    alone = Cluster("c", (pool("a", 1, 2), pool("b", 1, 2)))
    with pytest.raises(KeyError, match="nothing joins the pools"):
        route(alone, plan_of(shards=4), "fsdp")


def test_sixteen_thousand_devices_need_no_look_at_each():
    """What is alike is looked at once: routes of all pipeline ranks are one entry or few."""
    from trainwright.planner.cluster import topology

    big = Cluster("big", (pool("a", 2048, 8),))
    plan = plan_of(pp=16, shards=128, tp=8)
    topology._found.cache_clear()
    for rank in range(16):
        route(big, plan, "fsdp", rank)
        route(big, plan, "tp", rank)
    assert topology._found.cache_info().misses == 2
