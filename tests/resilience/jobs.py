"""What a rank does in the tests of hangs: joins, is watched, and calls collectives."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from trainwright.comm.groups import name_group
from trainwright.resilience.guard import watched
from trainwright.resilience.recorder import Recorder
from trainwright.resilience.watchdog import Limits

QUICK = Limits(period=0.1, hang=2.0, waiting=0.5)


def serve(job: str, rank: int, world_size: int, port: int, logs: str) -> None:
    """Run `job` as one of the ranks, with its standard error in its log."""
    log = os.open(Path(logs) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    recorder = Recorder(Path(logs), rank)
    with watched(Path(logs), QUICK):
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
        pair = dist.new_group([0, 1])
        if rank < 2:
            name_group(pair, "tp")
        JOBS[job](rank, pair)
        dist.barrier()
    recorder.close()
    os._exit(0)


def different_sizes(rank: int, pair: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(3), group=pair)
    dist.all_reduce(torch.ones(4 if rank == 0 else 8), group=pair)


def different_collectives(rank: int, pair: dist.ProcessGroup) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1000), group=pair)
    else:
        dist.broadcast(torch.ones(1000), 1, group=pair)
        dist.barrier(group=pair)


def crossed(rank: int, pair: dist.ProcessGroup) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(6), group=pair)
    elif rank == 1:
        dist.recv(torch.ones(5), 0)


def forgotten(rank: int, pair: dist.ProcessGroup) -> None:
    """Rank 1 leaves out what rank 0 waits for."""
    if rank == 0:
        work = dist.all_reduce(torch.ones(2, 3), group=pair, async_op=True)
        work.wait()


def slow(rank: int, pair: dist.ProcessGroup) -> None:
    """Rank 1 keeps rank 0 waiting for longer than any limit, and comes."""
    if rank == 1:
        time.sleep(2 * QUICK.hang)
    dist.all_reduce(torch.ones(2), group=pair)


def stopped(rank: int, pair: dist.ProcessGroup) -> None:
    while True:
        dist.all_reduce(torch.ones(2))


JOBS = {
    job.__name__: job
    for job in (different_sizes, different_collectives, crossed, forgotten, slow, stopped)
}
