"""Where a plan's groups lie on a machine, and what they go through to talk. No torch.

Workers take devices in the order of their ranks, so a group along an axis of the grid (pp,
dp_replicate, dp_shard, cp, tp; tp changing fastest) is a pattern of sizes and strides. What is true
of a pattern is found once, over all of its groups, and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainwright.planner.cluster.describe import Cluster, Kind, Link
from trainwright.planner.plan import Plan

Ids = NDArray[np.int64]
# Axes of the grid from the innermost out; dp_shard is in two parts for the sake of ep.
_INNERMOST_FIRST = ("tp", "cp", "ep", "outer", "dp_replicate", "pp")
# The axes that each group of `parallel.mesh` spans.
GROUPS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "ep": ("ep",),
    "pp": ("pp",),
    "dp_replicate": ("dp_replicate",),
    "dp_shard": ("ep", "outer"),
    "fsdp": ("cp", "ep", "outer"),
    "expert_fsdp": ("cp", "outer"),
    "replicas": ("cp", "ep", "outer", "dp_replicate"),
    "world": _INNERMOST_FIRST,
}


@dataclass(frozen=True)
class Level:
    """One kind of border that a group crosses: between devices of a node, nodes, racks or pools.

    The places on this level are devices, nodes, racks or pools. Of groups that differ the worst is
    told. Bandwidths are what collectives reach, in bytes/s each way.
    """

    near: bool  # between devices of a node
    link: str  # its name
    latency: float  # seconds
    each: float  # bytes/s of a device while all devices talk
    together: float  # bytes/s with which the group leaves one of the places
    fan: int  # places within one of the next level's
    hops: int  # borders of this kind on a ring through the group, the way back left out
    peers: int  # members that a member reaches by crossing just this border


@dataclass(frozen=True)
class Route:
    """What the groups along one axis of a plan go through; without levels where each is alone."""

    workers: int
    per_node: int  # members of a group in a node, at most
    nodes: int  # that a group spans, at most
    pools: int
    sharers: int  # groups that go through one network card at once
    kind: Kind
    levels: tuple[Level, ...]  # the innermost first; those alone that are crossed


def route(cluster: Cluster, plan: Plan, group: str, pp_rank: int | None = None) -> Route:
    """The route of `plan`'s groups of that name (see `GROUPS`), of one pipeline rank's or of all.

    Raises IndexError where the machine has fewer devices than the plan has workers, and KeyError
    where nothing joins two of its pools.
    """
    sizes = (plan.tp, plan.cp, plan.ep, plan.dp_shard // plan.ep, plan.dp_replicate, plan.pp)
    axes, stride = [], 1
    for name, size in zip(_INNERMOST_FIRST, sizes, strict=True):
        if name in GROUPS[group]:
            axes.append((size, stride))
        stride *= size
    if pp_rank is None or group in ("pp", "world"):
        return _pattern(cluster, tuple(axes), 0, plan.world_size, plan.world_size)
    block = plan.world_size // plan.pp
    return _pattern(cluster, tuple(axes), pp_rank * block, block, plan.world_size)


def boundary(cluster: Cluster, plan: Plan, first: int, second: int) -> Route:
    """The route from the workers of one pipeline rank to those of another; see `route`."""
    block = plan.world_size // plan.pp
    axes = ((2, abs(second - first) * block),)
    return _pattern(cluster, axes, min(first, second) * block, block, plan.world_size)


def _pattern(
    cluster: Cluster, axes: tuple[tuple[int, int], ...], start: int, count: int, world: int
) -> Route:
    """The route of the groups of these (size, stride) that begin in a range of ranks."""
    axes = tuple((size, stride) for size, stride in axes if size > 1)
    end = start + count + sum((size - 1) * stride for size, stride in axes if stride >= count)
    begins = 0
    for pool in cluster.pools:
        # Nodes, or racks, are alike as long as they are full: one range stands for many.
        period = pool.devices_per_node * (pool.nodes_per_rack or 1)
        full = (min(pool.devices, world - begins) // period) * period
        if begins <= start and end <= begins + full:
            start = begins + (start - begins) % period
            return _found(cluster, axes, start, count, period, world)
        begins += pool.devices
    return _found(cluster, axes, start, count, world, world)


@lru_cache(maxsize=8192)
def _found(
    cluster: Cluster,
    axes: tuple[tuple[int, int], ...],
    start: int,
    count: int,
    period: int,
    world: int,
) -> Route:
    members = _members(axes, start, count, period)
    return _Groups(cluster, _places(cluster, world), members).route()


@dataclass(frozen=True)
class _Places:
    """Where each rank is: device, node, rack and pool, numbered throughout the cluster.

    `on_node` and `in_pool` are the workers of any group that share a rank's node, or its pool.
    """

    depths: tuple[Ids, Ids, Ids, Ids]
    on_node: Ids
    in_pool: Ids


@lru_cache(maxsize=64)
def _places(cluster: Cluster, world: int) -> _Places:
    if world > cluster.devices:
        raise IndexError(f"{world} workers on {cluster.devices} devices")
    nodes, racks, pools = [], [], []
    first_node = first_rack = 0
    for number, pool in enumerate(cluster.pools):
        node = np.repeat(np.arange(pool.nodes), pool.devices_per_node)
        rack = node // (pool.nodes_per_rack or pool.nodes)
        nodes.append(first_node + node)
        racks.append(first_rack + rack)
        pools.append(np.full(pool.devices, number))
        first_node += pool.nodes
        first_rack += int(rack[-1]) + 1
    node, rack, pool_ = (np.concatenate(each)[:world] for each in (nodes, racks, pools))
    crowds = (np.bincount(ids)[ids] for ids in (node, pool_))
    return _Places((np.arange(world), node, rack, pool_), *crowds)


def _members(axes: Sequence[tuple[int, int]], start: int, count: int, period: int) -> Ids:
    """Ranks [groups, members], ascending, of the groups that begin in a range of ranks.

    Of those that begin a multiple of `period` apart, one.
    """
    offsets = np.zeros(1, dtype=np.int64)
    begins = np.arange(count)
    for size, stride in axes:  # the innermost first
        offsets = (np.arange(size)[:, None] * stride + offsets).ravel()
        begins = begins[begins // stride % size == 0]
    begins = begins[np.unique(begins % period, return_index=True)[1]]
    return start + begins[:, None] + offsets


class _Groups:
    """All groups of one pattern, [groups, members], and what they go through."""

    def __init__(self, cluster: Cluster, places: _Places, members: Ids) -> None:
        self.cluster = cluster
        self.workers = members.shape[1]
        self.places = [ids[members] for ids in places.depths]
        self.on_node, self.in_pool = places.on_node[members], places.in_pool[members]
        # Of each depth, and of all that there is.
        self.runs = [_runs(ids) for ids in self.places]
        groups = np.arange(len(members)) * self.workers
        self.runs.append((groups, np.full(len(members), self.workers)))

    def route(self) -> Route:
        """The worst of all groups."""
        pools = np.unique(self.places[3][:, [0, -1]] if self.workers > 1 else self.places[3])
        used = [self.cluster.pools[number] for number in range(pools[0], pools[-1] + 1)]
        per_node = int(self.runs[1][1].max())
        shared = any(pool.between.shared for pool in used)
        return Route(
            workers=self.workers,
            per_node=per_node,
            nodes=int(self._counts(1).max()),
            pools=int(self._counts(3).max()),
            sharers=-(-int(self.on_node.max()) // per_node) if shared else 1,
            kind=used[0].device.kind,
            levels=tuple(self._levels()),
        )

    def _counts(self, depth: int) -> Ids:
        """Places of a depth that each group has members in."""
        return np.bincount(self.runs[depth][0] // self.workers, minlength=len(self.places[0]))

    def _levels(self) -> Iterator[Level]:
        for depth, (own, around) in enumerate(zip(self.runs, self.runs[1:], strict=False)):
            hops = int((self._counts(depth) - self._counts(depth + 1)).max())
            if hops == 0:
                continue
            (begins, lengths), (outer_begins, outer_lengths) = own, around
            # Of each place: the one that it is within.
            within = np.searchsorted(outer_begins, begins, side="right") - 1
            fan = np.bincount(within)
            ways = list(self._ways(depth, begins, lengths, fan[within] > 1))
            yield Level(
                near=depth == 0,
                link=min(ways, key=lambda way: way.each).link.name,
                latency=max(way.link.latency for way in ways),
                each=min(way.each for way in ways),
                together=min(way.each * way.members for way in ways),
                fan=int(fan.max()),
                hops=hops,
                peers=int((outer_lengths[within] - lengths).max()),
            )

    def _ways(
        self, depth: int, begins: Ids, lengths: Ids, left: NDArray[np.bool_]
    ) -> Iterator[_Way]:
        """How the places that are `left` for others are left, each way once."""
        pool = self.places[3].flat[begins]
        # The places before and after on a ring through the group.
        first = np.flatnonzero(begins % self.workers == 0)
        last = np.append(first[1:], len(begins)) - 1
        before, after = np.roll(pool, 1), np.roll(pool, -1)
        before[first], after[last] = pool[last], pool[first]
        crowd = (self.in_pool if depth == 3 else self.on_node).flat[begins]
        columns = [each[left] for each in (pool, before, after, crowd, lengths)]
        # One number a row is far quicker to sort than rows.
        sizes = [int(each.max()) + 1 for each in columns]
        rows = np.ravel_multi_index(columns, sizes)
        rows = rows[:1] if (rows == rows[0]).all() else np.unique(rows)
        for here, ahead, behind, talking, members in zip(
            *(each.tolist() for each in np.unravel_index(rows, sizes)), strict=True
        ):
            for link in self._links(depth, here, {ahead, behind}):
                rates = self.cluster.pools[here].rates
                reached = (rates.networks if depth else rates.links) * link.bandwidth
                yield _Way(link, reached / (talking if link.shared else 1), members)

    def _links(self, depth: int, here: int, others: set[int]) -> Iterator[Link]:
        pool = self.cluster.pools[here]
        if depth < 3:
            yield (pool.inside, pool.between, pool.between_racks or pool.between)[depth]
            return
        for other in others - {here}:
            yield self.cluster.link(pool.name, self.cluster.pools[other].name)


@dataclass(frozen=True)
class _Way:
    """A link by which `members` of a group leave a place, and what each of them has of it."""

    link: Link
    each: float
    members: int


def _runs(ids: Ids) -> tuple[Ids, Ids]:
    """Flat indices at which groups enter a place, and how many of their members are in it."""
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = np.flatnonzero(new)
    return begins, np.diff(np.append(begins, ids.size))
