"""Seconds of a collective over a route: delay and bandwidth, by the best algorithm. No torch.

Formulas after Thakur et al. 2005 (doi:10.1177/1094342005051521) for rings and Sanders et al. 2009
(doi:10.1016/j.parco.2009.09.001) for two trees at once; by levels, a reduce-scatter within nodes is
followed by one between them of what is left. GPUs' libraries choose between protocols that trade
bandwidth for delay; the constants are NCCL's own, of its src/graph/tuning.cc, version 2.27.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainwright.planner.cluster.describe import Kind
from trainwright.planner.cluster.topology import Level, Route

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True)
class Protocol:
    """A way of handing data on: seconds, and the share of bandwidth that is payload.

    Hops count between devices of a node (`near`) and between nodes (`far`). `most` bytes/s go
    through however many links there are, in a node and between nodes.
    """

    start: float
    near: float
    far: float
    share: float
    tree_near: float
    tree_far: float
    tree_share: float
    most: tuple[float, float] = (math.inf, math.inf)


_NCCL = (
    # Half of each word is a flag; nothing waits for memory.
    Protocol(6.6e-6, 0.6e-6, 2.7e-6, 0.5, 0.6e-6, 5e-6, 1 / 3.8, (87.7e9, 19e9)),
    # Eight bytes of 128 are.
    Protocol(14e-6, 1.9e-6, 4e-6, 0.92, 1.25e-6, 8.5e-6, 0.86),
    # Whole chunks behind a fence.
    Protocol(8.4e-6, 3.4e-6, 14e-6, 1.0, 4e-6, 14e-6, 0.92),
)
# A link's own delay is all there is where no library's constants are known.
_PLAIN = (Protocol(0, 0, 0, 1, 0, 0, 1),)
PROTOCOLS: dict[Kind, tuple[Protocol, ...]] = {
    "cuda": _NCCL,
    "rocm": _NCCL,  # RCCL is made from it
    "tpu": _PLAIN,
    "cpu": _PLAIN,
}


def seconds(kind: Collective, size: float, route: Route) -> float:
    """Seconds that a collective takes, all groups along the axis at it at once.

    `size` is in bytes: of the whole tensor that is summed (all_reduce), comes out (all_gather) or
    goes in (reduce_scatter), of what each worker has for all others and itself (all_to_all), or of
    the message (send). 0 for a group of one.
    """
    if route.workers == 1:
        return 0.0
    return min(_by(protocol, kind, size, route) for protocol in PROTOCOLS[route.kind])


def _by(protocol: Protocol, kind: Collective, size: float, route: Route) -> float:
    levels = route.levels
    if kind == "send":
        outermost = levels[-1]
        slowest = min(_payload(protocol, level, level.each) for level in levels)
        return protocol.start + _hop(protocol, outermost) + size / slowest
    if kind == "all_to_all":
        return protocol.start + _exchange(protocol, size, route)
    one_way = min(_ring(protocol, size, route), _by_level(protocol, size, route))
    if kind == "all_reduce":
        return protocol.start + min(2 * one_way, _tree(protocol, size, route))
    return protocol.start + one_way


def _ring(protocol: Protocol, size: float, route: Route) -> float:
    """A chunk from each worker goes past all others: half an all-reduce."""
    delay = sum(level.hops * _hop(protocol, level) for level in route.levels)
    slowest = min(_payload(protocol, level, level.together) for level in route.levels)
    return delay + (route.workers - 1) / route.workers * size / slowest


def _by_level(protocol: Protocol, size: float, route: Route) -> float:
    """A ring on each level, with the share of the data that the levels below have left."""
    return sum(
        (level.fan - 1) * _hop(protocol, level)
        + (level.fan - 1) / level.fan * size / _payload(protocol, level, level.together)
        for level in route.levels
    )


def _tree(protocol: Protocol, size: float, route: Route) -> float:
    """Up and down two trees, each with half of the data: a chain in a node, branches between."""
    delay, slowest = 0.0, math.inf
    for level in route.levels:
        own = protocol.tree_near if level.near else protocol.tree_far
        steps = level.fan - 1 if level.near else math.log2(level.fan)
        delay += 2 * steps * max(own, level.latency)
        slowest = min(slowest, level.together)
    return delay + 2 * size / (slowest * protocol.tree_share)


def _exchange(protocol: Protocol, size: float, route: Route) -> float:
    """Messages to all others at once; those that cross the same border wait for each other."""
    slowest = max(
        level.peers / route.workers * size / _payload(protocol, level, level.each)
        for level in route.levels
    )
    return max(_hop(protocol, level) for level in route.levels) + slowest


def _hop(protocol: Protocol, level: Level) -> float:
    """The library's constants were measured over common links, whose delay they contain."""
    return max(protocol.near if level.near else protocol.far, level.latency)


def _payload(protocol: Protocol, level: Level, bandwidth: float) -> float:
    return min(protocol.share * bandwidth, protocol.most[0 if level.near else 1])
