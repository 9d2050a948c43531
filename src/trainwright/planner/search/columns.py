"""What many candidates have in common, found once: sizes of weights, of streams, times of links."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from trainwright.models.families import DecoderConfig
from trainwright.planner.candidate import Candidate
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.topology import route
from trainwright.planner.cost.collectives import Collective, seconds
from trainwright.planner.job import Job
from trainwright.planner.layout import split_layers
from trainwright.planner.memory import ELEMENT_BYTES, layer_bytes
from trainwright.planner.parameters import Weight, block_weights
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import placement
from trainwright.planner.search.grid import Column, Grid
from trainwright.planner.shapes import flops_per_token, head_outputs

# Of the mesh's groups, the axes whose sizes say where their members lie.
_WITHIN = {
    "tp": ("tp",),
    "cp": ("tp", "cp"),
    "ep": ("tp", "cp", "ep"),
    "fsdp": ("tp", "cp", "dp_shard"),
    "dp_replicate": ("tp", "cp", "dp_shard", "dp_replicate"),
    "replicas": ("tp", "cp", "dp_shard", "dp_replicate"),
    "pp": ("pp",),
}
_SMALL, _LARGE = 1e5, 1e9  # bytes, between which a collective's time is taken to be straight


def by(grid: Grid, fields: Sequence[str], function: Callable[..., Any]) -> Column:
    """`function` of some fields' numbers, called once for each of their combinations.

    [candidates], or [candidates, values] where it gives a tuple.
    """
    code = codes(grid, fields)
    _, first, places = np.unique(code, return_index=True, return_inverse=True)
    rows = zip(*(grid[name][first].tolist() for name in fields), strict=True)
    found = np.array([function(*row) for row in rows], dtype=float)
    return found[places] if len(found) else np.zeros(0)


def codes(grid: Grid, fields: Sequence[str]) -> Column:
    """A number [candidates] that two share only where they share some fields."""
    code = np.zeros(len(grid), dtype=np.int64)
    for name in fields:
        code = code * (int(grid[name].max(initial=0)) + 1) + grid[name]
    return code


def layer_kinds(config: DecoderConfig, within: range | None = None) -> dict[int, list[int]]:
    """Layers that are alike, by the first of them; all layers, or those `within` a range."""
    found: dict[object, list[int]] = {}
    for layer in range(config.num_layers) if within is None else within:
        kind = (config.is_sparse(layer), config.layer_windows[layer])
        found.setdefault(kind, []).append(layer)
    return {layers[0]: layers for layers in found.values()}


def plan_of(like: Candidate, **fields: Any) -> Plan:
    """A plan of one micro-batch with these degrees, for formulas that read but them."""
    plan = replace(
        Plan.alone(like.device or "cuda"),
        precision=like.precision,
        optimizer=like.optimizer,
        sequence_length=like.sequence_length or 1,
        **fields,
    )
    world = plan.pp * plan.data_ranks * plan.cp * plan.tp
    return replace(plan, world_size=world, zero=min(1, plan.dp_shard - 1))


@dataclass(frozen=True)
class Columns:
    """A grid's candidates with what formulas of time and of memory both need; all [candidates]."""

    job: Job
    grid: Grid

    def __len__(self) -> int:
        return len(self.grid)

    @cached_property
    def kinds(self) -> list[tuple[int, int]]:
        """The first layer of each kind and how many there are of it."""
        return [(first, len(all_)) for first, all_ in layer_kinds(self.job.config).items()]

    def plan(self, **fields: int) -> Plan:
        """`plan_of` these candidates, with the parts whole that so many workers leave whole."""
        return plan_of(self.grid.like, whole=self.grid.whole(fields.get("tp", 1)), **fields)

    @cached_property
    def cut_halves(self) -> Column:
        """Halves of a block that tp cuts, [candidates]."""
        return by(self.grid, ("tp",), lambda tp: 2 - len(set(self.grid.whole(tp))))

    @cached_property
    def tokens(self) -> Column:
        """Of a micro-batch on a worker, before tp cuts the stream."""
        return self.grid["micro_batch"] * (self.job.sequence_length / self.grid["cp"])

    @cached_property
    def stream(self) -> Column:
        """Bytes of those tokens' hidden states."""
        element = ELEMENT_BYTES[self.grid.like.precision]
        return self.tokens * self.job.config.hidden_size * element

    @cached_property
    def shards(self) -> Column:
        """Workers that share what dp_shard cuts; 1 where it cuts nothing."""
        sharded = self.grid["dp_shard"] > 1
        return np.where(sharded, self.grid["dp_shard"] * self.grid["cp"], 1)

    @cached_property
    def weights(self) -> Column:
        """Elements [candidates, 3] under tp and ep: all blocks, their experts, and one table.

        The blocks are without experts, of which a worker has its share by ep.
        """
        config, kinds = self.job.config, self.kinds
        table = Weight((head_outputs(config), config.hidden_size), 0, "outer")

        def sizes(tp: int, ep: int) -> tuple[float, float, float]:
            plan, blocks, experts = self.plan(tp=tp, ep=ep, dp_shard=ep), 0.0, 0.0
            for layer, many in kinds:
                for weight in block_weights(config, layer, tp, plan.whole):
                    if weight.group == "experts":
                        experts += many * weight.elements(plan)
                    else:
                        blocks += many * weight.elements(plan)
            return blocks, experts, table.elements(plan)

        return by(self.grid, ("tp", "ep"), sizes)

    @cached_property
    def layer_bytes(self) -> Column:
        """Bytes that a layer keeps of a token from its forward to its backward pass, on average."""
        config, values = self.job.config, self.grid.values["recompute"]

        def kept(tp: int, recompute: int) -> float:
            plan, policy = self.plan(tp=tp), values[recompute]
            each = (many * layer_bytes(config, plan, n, policy) for n, many in self.kinds)
            return sum(each) / config.num_layers

        return by(self.grid, ("tp", "recompute"), kept)

    @cached_property
    def whole_layer_bytes(self) -> Column:
        """What recomputing brings back of the largest layer, of a token."""
        config, values = self.job.config, self.grid.values["recompute"]

        def back(tp: int, recompute: int) -> float:
            plan, policy = self.plan(tp=tp), values[recompute]
            return max(
                layer_bytes(config, plan, n, "none") - layer_bytes(config, plan, n, policy)
                for n, _ in self.kinds
            )

        return by(self.grid, ("tp", "recompute"), back)

    @cached_property
    def fullest(self) -> Column:
        """Layers [candidates, 3]: the most on a rank, weighed with the head, and on the first.

        The second counts the head as the layers whose products it equals.
        """
        config, like = self.job.config, self.grid.like
        head = 2.0 * config.hidden_size * head_outputs(config)
        extra = head / ((flops_per_token(config, 1) - head) / config.num_layers)

        def most(pp: int, schedule: int, virtual: int) -> tuple[float, float, float]:
            if pp == 1:
                return config.num_layers, config.num_layers + extra, config.num_layers
            layers = like.stage_layers or split_layers(config, pp * virtual)
            held, work = [0.0] * pp, [0.0] * pp
            ranks = placement(self.grid.values["schedule"][schedule], pp, virtual)
            for rank, many in zip(ranks, layers, strict=True):
                held[rank] += many
                work[rank] += many
            work[ranks[-1]] += extra
            return max(held), max(work), held[0]

        return by(self.grid, ("pp", "schedule", "virtual_stages"), most)

    def line(self, cluster: Cluster, group: str, kind: Collective) -> Column:
        """Seconds [candidates, 3] of a collective along groups of the mesh, by its bytes.

        Delay and seconds a byte of a straight line through two sizes; and the least seconds a byte
        of any size, since no algorithm gets slower by a byte as there are more of them.
        """
        axes = _WITHIN[group]

        def through(world: int, *sizes: int) -> tuple[float, float, float]:
            degrees = dict(zip(axes, sizes, strict=True))
            degrees["dp_shard"] = degrees.get("dp_shard", degrees.get("ep", 1))
            # What is not on the group's way lies outside of it.
            rest = world // math.prod(n for axis, n in degrees.items() if axis != "ep")
            degrees["dp_replicate" if "pp" in axes else "pp"] = rest
            way = route(cluster, self.plan(**degrees), group)
            small, large, huge = (seconds(kind, s, way) for s in (_SMALL, _LARGE, 1e14))
            slope = (large - small) / (_LARGE - _SMALL)
            return max(0.0, small - slope * _SMALL), slope, huge / 1e14

        return by(self.grid, ("world", *axes), through)
