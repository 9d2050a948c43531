"""Ways to give a machine's devices to a plan's ranks, where pools of devices are not equal.

Ranks are a grid of (pp, dp_replicate, dp_shard, cp, tp) with the pipeline outermost, and take
devices in the cluster's order; so an arrangement is a cluster with its pools in another order, cut
to what is used. Pools may follow one another along a pipeline, each with as many stages as it has
devices for, and layers by its speed and memory; or each may have replicas of its own, pipelines or
not, and rows by their speed; or a pool may be left out, where the way to it is too slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.planner.candidate import Candidate
from trainwright.planner.cluster.describe import Cluster, Pool
from trainwright.planner.job import Job
from trainwright.planner.layout import divisors, split_rows
from trainwright.planner.search.stage_costs import model_seconds

Speeds = Mapping[str, float]  # of a device, by its pool's name

_LEAST_USED = 0.75  # of the pools' speed: what leaves more idle loses to other sizes
_MOST_POOLS = 4  # more are tried from the quickest on, not in every combination
_PIPELINES = (1, 2, 4, 8)  # stages of a replica within a pool
_UNITS = 16  # rows a replica has a multiple of, at most: coarser ones balance worse


@dataclass(frozen=True)
class Arrangement:
    """Devices in the order of ranks, how many are used, and the plan's fields that follow."""

    cluster: Cluster
    world: int
    given: Mapping[str, Any] = field(default_factory=dict)

    def agrees(self, fixed: Mapping[str, Any]) -> bool:
        """Whether nothing that is given is something else here."""
        own = {"world_size": self.world, **self.given}
        return all(fixed.get(name, value) == value for name, value in own.items())


def arrangements(
    job: Job, cluster: Cluster, like: Candidate, fixed: Mapping[str, Any], *, saves: bool
) -> Iterator[Arrangement]:
    """All that are worth a try; of one pool all its devices, and fewer where that `saves`.

    Saving money or energy can mean to leave devices alone. Given degrees are kept.
    """
    speeds = {pool.name: 1 / model_seconds(job, like, pool) for pool in cluster.pools}
    for pools in _subsets(cluster, speeds):
        found: Iterator[Arrangement]
        if len(pools) == 1:
            found = _one_pool(cluster, pools[0], fixed, saves=saves)
        else:
            found = itertools.chain(
                _along_a_pipeline(cluster, pools, speeds, job.config.num_layers),
                _replicas(cluster, pools, speeds, like.rows or 1),
            )
        yield from (each for each in found if each.agrees(fixed))


def _subsets(cluster: Cluster, speeds: Speeds) -> Iterator[tuple[Pool, ...]]:
    """Sets of pools, in the cluster's order: every one, or of many pools the quickest."""
    pools = cluster.pools
    if len(pools) <= _MOST_POOLS:
        for size in range(len(pools), 0, -1):
            yield from itertools.combinations(pools, size)
        return
    quick = sorted(pools, key=lambda pool: -pool.devices * speeds[pool.name])
    for size in range(len(pools), 0, -1):
        yield tuple(pool for pool in pools if pool in quick[:size])


def _one_pool(
    cluster: Cluster, pool: Pool, fixed: Mapping[str, Any], *, saves: bool
) -> Iterator[Arrangement]:
    own = cluster if len(cluster.pools) == 1 else replace(cluster, pools=(pool,))
    if "world_size" in fixed:
        if fixed["world_size"] <= pool.devices:
            yield Arrangement(own, fixed["world_size"])
        return
    yield Arrangement(own, pool.devices)
    nodes = pool.nodes // 2
    while saves and nodes:
        yield Arrangement(own, nodes * pool.devices_per_node)
        nodes //= 2


def fewer(cluster: Cluster) -> Iterator[Arrangement]:
    """A pool's devices without some, the most first: for batches that all of them cannot share."""
    for pool in cluster.pools:
        own = replace(cluster, pools=(pool,))
        each = pool.devices_per_node
        yield from (Arrangement(own, n * each) for n in range(pool.nodes - 1, 0, -1))
        yield from (Arrangement(own, n) for n in range(each - 1, 0, -1))


def launched_ranks(machine: Cluster, arranged: Cluster) -> tuple[int, ...]:
    """A launcher's ranks, which number the devices of `machine`, in the order of `arranged`.

    () where that is their own order.
    """
    starts = itertools.accumulate((pool.devices for pool in machine.pools), initial=0)
    free = {pool.name: start for pool, start in zip(machine.pools, starts, strict=False)}
    ranks: list[int] = []
    for pool in arranged.pools:
        ranks += range(free[pool.name], free[pool.name] + pool.devices)
        free[pool.name] += pool.devices
    return () if ranks == sorted(ranks) else tuple(ranks)


def _along_a_pipeline(
    cluster: Cluster, pools: Sequence[Pool], speeds: Speeds, layers: int
) -> Iterator[Arrangement]:
    """One pool after another: every stage on devices of one kind, equally many of them.

    Those with the most memory come first, where the most micro-batches are under way; `orders`
    has the others.
    """
    ordered = sorted(pools, key=lambda pool: -pool.device.memory_bytes)
    for block in _sizes(pools):
        stages = [pool.devices // block for pool in ordered]
        pp = sum(stages)
        slices = [_cut(p, n * block) for p, n in zip(ordered, stages, strict=True)]
        if min(stages) and pp <= layers and all(slices) and _used(pools, slices, speeds):
            own = replace(cluster, pools=tuple(filter(None, slices)))
            yield Arrangement(own, pp * block, {"pp": pp, "virtual_stages": 1})


def orders(arranged: Cluster) -> Iterator[Cluster]:
    """The other orders of pools along a pipeline."""
    if 1 < len(arranged.pools) <= _MOST_POOLS:
        for pools in itertools.permutations(arranged.pools):
            if pools != arranged.pools:
                yield replace(arranged, pools=pools)


def _replicas(
    cluster: Cluster, pools: Sequence[Pool], speeds: Speeds, rows: int
) -> Iterator[Arrangement]:
    """Replicas within pools, with rows by their speed; their stages lie side by side.

    A stage's ranks are of all replicas, so with a pipeline each stage has a slice of every pool.
    """
    for size in _sizes(pools):
        counts = [pool.devices // size for pool in pools]
        used = [_cut(pool, n * size) for pool, n in zip(pools, counts, strict=True)]
        if not min(counts) or sum(counts) > rows or not _used(pools, used, speeds):
            continue
        each = [speeds[p.name] for p, n in zip(pools, counts, strict=True) for _ in range(n)]
        for pp in _PIPELINES:
            slices = [
                _cut(pool, count * size // pp) if size % pp == 0 else None
                for pool, count in zip(pools, counts, strict=True)
            ]
            if not all(slices) or (pp > 1 and not all(map(_has_whole_nodes, slices, pools))):
                continue
            same = {frozenset((pool.name,)): pool.between for pool in pools}
            own = replace(
                cluster, pools=tuple(filter(None, slices)) * pp, links={**cluster.links, **same}
            )
            for shares in _shares(rows, each):
                given = {"pp": pp, "dp_replicate": len(each), "rows_by_replica": shares}
                yield Arrangement(own, sum(counts) * size, given)


def _shares(rows: int, speeds: Sequence[float]) -> list[tuple[int, ...]]:
    """Rows by speed, in units that shards and micro-batches divide; the finest balance the best."""
    units = (unit for unit in divisors(rows) if unit <= _UNITS and rows // unit >= len(speeds))
    return list(dict.fromkeys(split_rows(rows, speeds, unit) for unit in units))


def _sizes(pools: Sequence[Pool]) -> list[int]:
    """Devices of a replica or of a pipeline rank: what divides some pool."""
    return sorted({size for pool in pools for size in divisors(pool.devices)})


def _cut(pool: Pool, devices: int) -> Pool | None:
    """So many devices of a pool, whole nodes or a part of one; None where that is neither."""
    nodes, rest = divmod(devices, pool.devices_per_node)
    if not rest:
        return replace(pool, nodes=nodes)
    return None if nodes else replace(pool, nodes=1, devices_per_node=devices)


def _has_whole_nodes(part: Pool | None, pool: Pool) -> bool:
    return part is not None and part.devices_per_node == pool.devices_per_node


def _used(pools: Sequence[Pool], parts: Sequence[Pool | None], speeds: Speeds) -> bool:
    """Whether parts of pools have most of their speed."""
    used = sum(part.devices * speeds[part.name] for part in parts if part is not None)
    return used >= _LEAST_USED * sum(pool.devices * speeds[pool.name] for pool in pools)
