"""The workers of a run: who this process is, which device it drives, and the mesh they form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # long enough for a first compile or a slow disk


@dataclass(frozen=True)
class World:
    """This worker among all workers. A run with one worker needs no process group."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = COLLECTIVE_TIMEOUT  # of every collective, in any group

    @property
    def is_first(self) -> bool:
        """Whether this worker is the one that prints, and writes what only one may write."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """Every worker's `value`, in rank order, on every worker."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_workers(self, values: list[int]) -> list[int]:
        """The first worker's `values`, on every worker; all have as many."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, device=self.device)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def wait(self, limit: timedelta) -> None:
        """Until every worker is here, however long one of them takes within `limit`."""
        if self.size > 1:
            dist.barrier(dist.new_group(backend="gloo", timeout=limit))


def join_world() -> World:
    """Join the workers that the launcher's environment describes (RANK, WORLD_SIZE, LOCAL_RANK)."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # CPU tensors travel too: checkpoints are planned and written from host memory.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if size > 1:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return World(rank, size, device)


def leave_world(world: World) -> None:
    """Take down the process group, once all workers have reached this line."""
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()
