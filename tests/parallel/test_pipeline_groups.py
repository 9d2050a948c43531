"""A pipeline's groups on GPUs: one for each boundary and direction, their ranks connected first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.pipelines import make_plan
from tests.workers import run_on
from trainwright.parallel.mesh import build_mesh
from trainwright.parallel.pipeline import Pipeline
from trainwright.parallel.world import World

STREAM = ((2, 3), torch.float32)


def run_as_on_gpus(schedule: str, stages: int, micro_batches: int) -> list[float]:
    """A step through stages that double their input; the last stage's results.

    As with NCCL, the first message between two ranks in a group waits for both of them.
    """
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), timedelta(seconds=5))
    plan = make_plan(world.size, schedule, [1] * stages, micro_batches)
    connected: set[Any] = set()

    def waiting(call: Callable[..., Any]) -> Callable[..., Any]:
        def talk(tensor: Tensor, peer: int, group: Any = None, tag: int = 0) -> Any:
            if group not in connected:
                connected.add(group)
                dist.barrier(group)
            return call(tensor, peer, group, tag)

        return talk

    def forward(stage: int, micro_batch: int, stream: Tensor | None) -> Tensor:
        if stream is None:
            stream = torch.full(STREAM[0], float(micro_batch + 1), requires_grad=True)
        return 2 * stream if stage < stages - 1 else (2 * stream).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", waiting(dist.isend))
        patch.setattr(dist, "irecv", waiting(dist.irecv))
        pipeline = Pipeline(plan, build_mesh(plan, world), world.device)
        pipeline._groups = pipeline._groups_by_direction()
        results = pipeline.run(forward, micro_batches, lambda micro_batch: STREAM)
    return [float(result) for result in results]


@pytest.mark.parametrize(
    ("ranks", "schedule", "stages", "micro_batches"),
    [(2, "interleaved", 4, 1), (3, "gpipe", 3, 4)],
)
def test_ranks_are_connected_before_a_schedule_could_make_them_wait_for_each_other(
    ranks, schedule, stages, micro_batches
):
    found = run_on(ranks, run_as_on_gpus, schedule, stages, micro_batches, timeout=60)
    assert found[-1] == [6.0 * 2**stages * (m + 1) for m in range(micro_batches)]
