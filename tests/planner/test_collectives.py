"""Seconds of collectives, against closed formulas and simulations that send step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trainwright.planner.cluster.catalogue import device, link
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.cluster.topology import Level, Route, boundary, route
from trainwright.planner.cost import collectives
from trainwright.planner.cost.collectives import PROTOCOLS, seconds
from trainwright.planner.plan import Plan

PLAIN = DeviceKind("c", "cpu", 16e9, {"fp32": 1e12}, 50e9, 65, 10, 8)
IDEAL = Rates(links=1.0, networks=1.0)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


def level(size: int, latency: float, each: float, **fields) -> Level:
    values = {
        "near": True,
        "link": "l",
        "latency": latency,
        "each": each,
        "together": each,
        "fan": size,
        "hops": size - 1,
        "peers": size - 1,
    }
    return Level(**{**values, **fields})


def one_level(size: int, latency: float = 2e-5, bandwidth: float = 3e9) -> Route:
    levels = (level(size, latency, bandwidth),) if size > 1 else ()
    return Route(size, size, 1, 1, 1, "cpu", levels)


def ring(chunks: list[float], hops: list[tuple[float, float]]) -> float:
    """Every worker hands on what it got last, until all have gone past all others.

    `hops` are (delay, bytes/s) from a worker to the next. A port sends one chunk at a time.
    """
    count = len(hops)
    free = [0.0] * count  # when a worker's port is
    arrived = [0.0] * count  # when the chunk that it sends next has come
    for step in range(count - 1):
        coming = [0.0] * count
        for worker, (delay, bandwidth) in enumerate(hops):
            chunk = chunks[(worker - step) % count]
            free[worker] = max(free[worker], arrived[worker]) + chunk / bandwidth
            coming[(worker + 1) % count] = free[worker] + delay
        arrived = coming
    return max(arrived)


def chain_and_back(count: int, size: float, delay: float, bandwidth: float, pieces: int) -> float:
    """An all-reduce along a chain of workers in `pieces`: sums up to the first, and down again."""
    up = [[0.0] * pieces for _ in range(count)]
    for worker in range(count - 2, -1, -1):
        free = 0.0
        for piece in range(pieces):
            free = max(free, up[worker + 1][piece]) + size / pieces / bandwidth
            up[worker][piece] = free + delay
    down = up[0]
    for _ in range(count - 1):
        free, coming = 0.0, []
        for piece in range(pieces):
            free = max(free, down[piece]) + size / pieces / bandwidth
            coming.append(free + delay)
        down = coming
    return max(down)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("message", [1e3, 1e6, 1e9])
def test_a_ring_step_by_step(size, message):
    way = one_level(size)
    simulated = ring([message / size] * size, [(2e-5, 3e9)] * size)
    assert seconds("all_gather", message, way) == pytest.approx(simulated)
    assert seconds("reduce_scatter", message, way) == pytest.approx(simulated)


@pytest.mark.parametrize("nodes", [2, 4, 5])
def test_a_ring_over_nodes_step_by_step(nodes):
    """Four devices a node; the ring leaves each node once, over a slower link."""
    hops = [(1e-6, 1e11), (1e-6, 1e11), (1e-6, 1e11), (1e-5, 1e10)] * nodes
    count = len(hops)
    near = level(4, 1e-6, 1e11, hops=3 * nodes)
    far = level(nodes, 1e-5, 1e10, near=False, hops=nodes - 1)
    way = Route(count, 4, nodes, 1, 1, "cpu", (near, far))
    simulated = ring([1e9 / count] * count, hops)
    told = collectives._ring(PROTOCOLS["cpu"][0], 1e9, way)
    assert told == pytest.approx(simulated, rel=0.02)


@pytest.mark.parametrize("nodes", [2, 4, 5])
def test_levels_are_rings_one_after_the_other(nodes):
    """By level: each of a node's four cards carries a ring of its own quarter of the data."""
    near, far = level(4, 1e-6, 1e11), level(nodes, 1e-5, 1e10, near=False, together=4e10)
    way = Route(4 * nodes, 4, nodes, 1, 1, "cpu", (near, far))
    inside = ring([1e9 / 4] * 4, [(1e-6, 1e11)] * 4)
    outside = ring([1e9 / 4 / nodes] * nodes, [(1e-5, 1e10)] * nodes)
    told = collectives._by_level(PROTOCOLS["cpu"][0], 1e9, way)
    assert told == pytest.approx(inside + outside)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_tree_in_a_node_is_a_chain_in_pieces(size):
    """As pieces get smaller, up and down a chain takes its delays, and the data twice at most."""
    way, message = one_level(size, latency=1e-4), 1e8
    told = collectives._tree(PROTOCOLS["cpu"][0], message, way)
    simulated = chain_and_back(size, message, 1e-4, 3e9, pieces=20_000)
    # Up and down overlap in a chain that is cut in pieces; the model lets them follow each other.
    assert simulated <= told <= 2 * simulated
    delays = chain_and_back(size, 1.0, 1e-4, 3e9, pieces=1)
    assert collectives._tree(PROTOCOLS["cpu"][0], 1.0, way) == pytest.approx(delays, rel=1e-4)


def test_an_all_to_all_message_by_message():
    """Each worker's own port sends to those within its node and, over another, to all others."""
    near = level(4, 1e-6, 1e11, peers=3)
    far = level(4, 1e-5, 1e10, near=False, peers=12)
    way = Route(16, 4, 4, 1, 1, "cpu", (near, far))
    message = 1e8 / 16
    ports = {"near": 0.0, "far": 0.0}
    last = 0.0
    for peer in range(1, 16):
        port, delay, bandwidth = ("near", 1e-6, 1e11) if peer < 4 else ("far", 1e-5, 1e10)
        ports[port] += message / bandwidth
        last = max(last, ports[port] + delay)
    assert seconds("all_to_all", 1e8, way) == pytest.approx(last)


def test_the_formulas_of_textbooks():
    """Ring: 2(n-1)a + 2(n-1)/n S/B; by level as in Thakur et al.; a message a + S/B."""
    near = level(8, 1e-6, 1e11)
    far = level(4, 1e-5, 1e10, near=False, together=8e10, hops=3, peers=24)
    way = Route(32, 8, 4, 1, 1, "cpu", (replace(near, hops=28), far))
    flat = 2 * (28 * 1e-6 + 3 * 1e-5) + 2 * 31 / 32 * 1e9 / 8e10
    levels = 2 * (7 * 1e-6 + 7 / 8 * 1e9 / 1e11 + 3 * 1e-5 + 3 / 4 * 1e9 / 8e10)
    tree = 2 * (7 * 1e-6 + 2 * 1e-5) + 2 * 1e9 / 8e10
    assert seconds("all_reduce", 1e9, way) == pytest.approx(min(flat, levels, tree))
    assert seconds("send", 1e9, way) == pytest.approx(1e-5 + 1e9 / 1e10)


def test_small_sums_over_many_nodes_go_by_trees():
    far = level(256, 3e-6, 5e10, near=False)
    way = Route(256, 1, 256, 1, 1, "cuda", (far,))
    # NCCL: LL's start and its delay between nodes, 8 levels up and 8 down.
    assert seconds("all_reduce", 8.0, way) == pytest.approx(6.6e-6 + 16 * 5e-6, rel=1e-3)
    # And large ones by rings with whole chunks.
    expected = 8.4e-6 + 2 * (255 * 14e-6 + 255 / 256 * 1e11 / 5e10)
    assert seconds("all_reduce", 1e11, way) == pytest.approx(expected)


def test_what_nccl_reaches_on_eight_h100():
    """A sum of 8 GB in a node: about 370 GB/s on the bus as nccl-tests count, of 450."""
    way = route(_cluster("H100-SXM", "NVLink-4", "InfiniBand-NDR"), _plan(shards=8), "fsdp")
    bus = 2 * 7 / 8 * 8e9 / seconds("all_reduce", 8e9, way)
    assert 330e9 < bus < 400e9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_more_bytes_and_more_workers_never_take_less(kind, shared):
    fabric = replace(link("InfiniBand-NDR"), shared=shared)
    cluster = _cluster("H100-SXM", "NVLink-4", fabric, nodes=64)
    sizes = [2.0**power for power in range(0, 34, 2)]
    before = [0.0] * len(sizes)
    for workers in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        way = route(cluster, _plan(shards=workers), "fsdp")
        taken = [seconds(kind, size, way) for size in sizes]
        assert taken == sorted(taken)
        assert all(now >= then for now, then in zip(taken, before, strict=True))
        before = taken


def test_the_slower_way_of_a_line_counts():
    wide = Link("home", 20e-3, up=5e6, down=30e6)
    cluster = Cluster("c", (_pool("a", 1, 2), _pool("b", 1, 2)), {frozenset("ab"): wide}, None)
    plan = _plan(pp=2, shards=2)
    assert seconds("send", 5e6, boundary(cluster, plan, 0, 1)) == pytest.approx(20e-3 + 1.0)


def test_eight_groups_on_one_card_have_an_eighth_each():
    alone = _cluster("H100-SXM", "NVLink-4", "Ethernet-100", nodes=4)
    own = _cluster("H100-SXM", "NVLink-4", replace(link("Ethernet-100"), shared=False), nodes=4)
    plan = _plan(shards=4, tp=8)
    shared, each = (seconds("all_gather", 1e10, route(c, plan, "fsdp")) for c in (alone, own))
    assert shared == pytest.approx(8 * each, rel=0.01)


def test_a_group_of_one_takes_no_time():
    for kind in KINDS:
        assert seconds(kind, 1e9, one_level(1)) == 0.0


def test_pools_over_an_ocean_cost_the_ocean():
    wide = Link("ocean", 40e-3, 1e9, 1e9, shared=True)
    cluster = Cluster("c", (_pool("a", 4, 8), _pool("b", 4, 8)), {}, wide)
    way = route(cluster, _plan(replicas=2, shards=32), "dp_replicate")
    # 32 groups of two go over one line: each has a 32nd of it.
    expected = 2 * (40e-3 + 1 / 2 * 1e6 / (1e9 / 32))
    assert seconds("all_reduce", 1e6, way) == pytest.approx(expected)
    assert math.isclose(way.levels[-1].each, 1e9 / 32)


def _pool(name: str, nodes: int, devices: int) -> Pool:
    near, far = Link("near", 1e-6, 1e11, 1e11), Link("far", 1e-5, 1e10, 1e10)
    return Pool(name, PLAIN, nodes, devices, near, far, rates=IDEAL)


def _cluster(kind: str, inside: str, between: str | Link, nodes: int = 2) -> Cluster:
    fabric = link(between) if isinstance(between, str) else between
    return Cluster("c", (Pool("a", device(kind), nodes, 8, link(inside), fabric),))


def _plan(pp=1, replicas=1, shards=1, tp=1) -> Plan:
    world = pp * replicas * shards * tp
    return Plan(
        world, replicas, shards, 1, 1, 1, "bf16", "none", False, "cuda", 128, "adamw", pp=pp, tp=tp
    )
