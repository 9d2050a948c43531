"""The mesh: which workers form a group along each axis of parallelism.

The world is a grid of (pp, dp_replicate, dp_shard, cp, tp), tp changing fastest, so that the axes
that talk most lie closest together. Other groups are made of these: experts are cut over `ep`, the
inner part of dp_shard; weights are sharded over `fsdp` = dp_shard × cp, and experts over
`expert_fsdp`, what ep leaves of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainwright.comm.groups import name_group
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan

# Axes of the grid from the outermost to the innermost; dp_shard is in two parts for ep's sake.
GRID = ("pp", "dp_replicate", "outer", "ep", "cp", "tp")
# Every group that a plan may need, as the axes that it spans.
SPANS: dict[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "dp_replicate": ("dp_replicate",),
    "cp": ("cp",),
    "tp": ("tp",),
    "ep": ("ep",),
    "fsdp": ("outer", "ep", "cp"),  # weights are sharded over it
    "expert_fsdp": ("outer", "cp"),  # experts are, where they are cut over ep
    "replicas": ("dp_replicate", "outer", "ep", "cp"),  # all that have other tokens
}
# Other names for places in the grid, without a group.
PLACES: dict[str, tuple[str, ...]] = {
    "dp_shard": ("outer", "ep"),
    "data": ("dp_replicate", "outer", "ep"),  # all that have other rows
    **SPANS,
}

# By name too: two axes may join the same workers, and their traffic is told apart.
_groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}


class Mesh:
    """This worker's place in the grid, and its groups. Building it is collective."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.world = world
        self.plan = plan
        shape = (
            plan.pp,
            plan.dp_replicate,
            plan.dp_shard // plan.ep,
            plan.ep,
            plan.cp,
            plan.tp,
        )
        if math.prod(shape) != world.size:
            raise ValueError(f"a grid of {shape} needs {math.prod(shape)} workers: {world.size}")
        self._grid = np.array(plan.ranks or range(world.size)).reshape(shape)
        # torch numbers the members of a group by their ranks, so those that cut something among
        # themselves must stand in that order; pipelines and replicas may stand in any.
        if (np.diff(self._grid.reshape(*shape[:2], -1)) < 0).any():
            raise ValueError(f"ranks descend within a replica's stage: {plan.ranks}")
        self._place = dict(zip(GRID, np.argwhere(self._grid == world.rank)[0], strict=True))
        self._own: dict[str, dist.ProcessGroup | None] = {}
        for name, axes in SPANS.items():
            self._own[name] = (
                self._join(name, self._all_ranks(axes)) if self.size(name) > 1 else None
            )
        self._meshes: dict[str, DeviceMesh] = {}

    def _join(self, name: str, groups: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """Make all these groups, as every worker does in the same order; the own one, if any."""
        own = None
        for ranks in groups:
            if (name, ranks) not in _groups:
                _groups[name, ranks] = dist.new_group(list(ranks), timeout=self.world.timeout)
            if self.world.rank in ranks:
                own = _groups[name, ranks]
        if own is not None:
            name_group(own, name.partition(" ")[0])
        return own

    def _all_ranks(self, axes: Sequence[str]) -> list[tuple[int, ...]]:
        """All groups along `axes`, each in rank order."""
        inner = [GRID.index(axis) for axis in axes]
        outer = [axis for axis in range(len(GRID)) if axis not in inner]
        count = math.prod(self._grid.shape[axis] for axis in inner)
        rows = self._grid.transpose(*outer, *inner).reshape(-1, count)
        return [tuple(row) for row in rows.tolist()]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """This worker's group of that name; None where it would be alone."""
        return self._own[name]

    def ranks(self, name: str) -> tuple[int, ...]:
        """The workers of this worker's group, in its order."""
        return next(r for r in self._all_ranks(PLACES[name]) if self.world.rank in r)

    def size(self, name: str) -> int:
        """Workers in the group."""
        return math.prod(self._grid.shape[GRID.index(axis)] for axis in PLACES[name])

    def index(self, name: str) -> int:
        """This worker's place in the group."""
        index = 0
        for axis in PLACES[name]:
            index = index * self._grid.shape[GRID.index(axis)] + int(self._place[axis])
        return index

    def device_mesh(self, name: str) -> DeviceMesh:
        """`fsdp` or `expert_fsdp` for FSDP2: 1-D, or [dp_replicate, name] where there are replicas.

        Collective the first time.
        """
        if name not in self._meshes:
            self._meshes[name] = self._build_device_mesh(name)
        return self._meshes[name]

    def _build_device_mesh(self, name: str) -> DeviceMesh:
        kind = self.world.device.type
        own = self._group_or_alone(name)
        if self.plan.dp_replicate == 1:
            return DeviceMesh.from_group(own, kind, mesh_dim_names=(name,))
        axes = ("dp_replicate", *SPANS[name])
        members = next(r for r in self._all_ranks(axes) if self.world.rank in r)
        grid = torch.tensor(members).reshape(self.plan.dp_replicate, -1)
        return DeviceMesh.from_group(
            [self._group_or_alone("dp_replicate"), own],
            kind,
            mesh=grid,
            mesh_dim_names=("dp_replicate", name),
        )

    def _group_or_alone(self, name: str) -> dist.ProcessGroup:
        """The group, or one of this worker alone: FSDP wants a group of any size."""
        own = self._own[name]
        if own is None:
            own = self._join(name, [(rank,) for rank in range(self.world.size)])
            assert own is not None
        return own

    def pair(self, name: str, first: int, second: int) -> dist.ProcessGroup | None:
        """The group of the two ranks of this worker's pipeline; None on the others. Collective.

        Its traffic is booked under the first word of `name`.
        """
        pairs = [(ranks[first], ranks[second]) for ranks in self._all_ranks(SPANS["pp"])]
        return self._join(name, pairs)


def build_mesh(plan: Plan, world: World) -> Mesh:
    """The mesh of `plan` over all workers. Collective."""
    return Mesh(plan, world)


def forget_groups() -> None:
    """Forget all groups: they ended with the process group of the world."""
    _groups.clear()
