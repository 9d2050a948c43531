"""One of the processes of `training.calibration`: measures point after point beside the others."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import psutil
import torch
import torch.distributed as dist

from trainwright.training.calibration_points import groups
from trainwright.training.probes import holes_of, probe_plans, run_probe
from trainwright.training.stopwatch import Place, Point, hidden_share, measure


def work(
    place: Path, kind: str, workers: int, rank: int, threads: int, cores: int, seconds: float
) -> None:
    """Measure the points of `place` for so many seconds; rank 0 writes `found.jsonl`."""
    torch.set_num_threads(threads)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    backend = "gloo"
    if kind == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    before = joined = resident()
    where = Place(device, {}, max(1.0, workers * threads / cores) / threads)
    if workers > 1:
        store = dist.FileStore(str(place / "meet"), workers)
        limit = timedelta(minutes=5)
        dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=limit)
        dist.barrier()
        joined = resident()
        where = replace(where, groups={size: own_group(size) for size in groups(workers)})
    ends = time.monotonic() + seconds
    # All measure, and the first one writes.
    with (place / "found.jsonl" if rank == 0 else Path(os.devnull)).open("a") as found:
        if workers > 1:
            write(found, {"process_bytes": before, "group_bytes": max(0, joined - before)})
            write(found, {"hidden_share": hidden_share(where)})
        if device.type == "cpu":
            write_probes(found, workers, threads, joined)
        for entry in json.loads((place / "points.json").read_text()):
            if over(ends, where):
                break
            point = Point(entry["kernel"], entry["precision"], tuple(entry["shape"]))
            write(found, {**asdict(point), "seconds": mean(measure(point, where), where)})
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def write_probes(found: TextIO, workers: int, threads: int, before: int) -> None:
    """Whole steps; of the first plan's, what the process came to hold."""
    for number, plan in enumerate(probe_plans(workers, threads)):
        seconds, peak = run_probe(plan)
        holes = holes_of(plan, peak - before) if number == 0 else None
        write(found, {"plan": plan.to_json(), "seconds": seconds, "holes": holes})


def own_group(size: int) -> dist.ProcessGroup:
    """The group of neighbouring ranks, `size` of them, that this one is in. Collective."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    made = [dist.new_group(list(range(first, first + size))) for first in range(0, workers, size)]
    return made[rank // size]


def mean(seconds: float, place: Place) -> float:
    """The mean over the workers: each waits for the others, one way or another."""
    if not place.groups:
        return seconds
    total = torch.tensor([seconds], dtype=torch.float64, device=place.device)
    dist.all_reduce(total)
    return float(total) / max(place.groups)


def over(ends: float, place: Place) -> bool:
    """Whether the time is up, as the first worker says."""
    if not place.groups:
        return time.monotonic() > ends
    verdict = torch.tensor([float(time.monotonic() > ends)], device=place.device)
    dist.broadcast(verdict, 0)
    return bool(verdict)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def write(file: TextIO, entry: dict) -> None:
    """A line, at once."""
    file.write(json.dumps(entry) + "\n")
    file.flush()


if __name__ == "__main__":
    folder, kind, *numbers, seconds = sys.argv[1:]
    workers, rank, threads, cores = map(int, numbers)
    work(Path(folder), kind, workers, rank, threads, cores, float(seconds))
