"""One of the processes of `training.calibration`: measures point after point beside the others."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from trainwright.models.families import decoder_config, new_hf_config
from trainwright.parallel.world import World
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine, Plan
from trainwright.recipe.schema import Recipe
from trainwright.resilience.out_of_memory import peak_bytes
from trainwright.training.calibration_points import groups
from trainwright.training.sameness import Trial
from trainwright.training.stopwatch import Place, Point, hidden_share, measure

_SMALL = {
    "vocab_size": 16384,  # a chunk of the head's logits is full, as in larger models
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}


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
    before = resident()
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
            constants: dict[str, float] = {"process_bytes": before}
            constants["group_bytes"] = max(0, joined - before)
            if device.type == "cpu":
                constants["allocator_ratio"] = allocator_ratio(workers, threads, joined)
            write(found, constants)
            write(found, {"hidden_share": hidden_share(where)})
        for entry in json.loads((place / "points.json").read_text()):
            if over(ends, where):
                break
            point = Point(entry["kernel"], entry["precision"], tuple(entry["shape"]))
            write(found, {**asdict(point), "seconds": mean(measure(point, where), where)})
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def allocator_ratio(workers: int, threads: int, before: int) -> float:
    """Trains a small model for two steps: what this process came to hold, over what is counted."""
    config = new_hf_config("llama", _SMALL, _SMALL["vocab_size"])
    rows, tokens = 4, _SMALL["max_position_embeddings"]
    plan = replace(
        Plan.alone(),
        world_size=workers,
        dp_replicate=workers,
        threads=threads,
        precision="bf16",
        micro_batch=rows,
        sequence_length=tokens,
    )
    recipe = Recipe.model_validate(
        {
            "name": "allocator",
            "model": {"family": "llama", "config": _SMALL},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": tokens},
            "training": {"steps": 2, "batch_sequences": rows * workers},
        }
    )
    world = World(dist.get_rank(), workers, torch.device("cpu"))
    trial = Trial(recipe, config, plan, world, rows=rows * workers)
    for index in range(2):
        trial.train(index)
    machine = Machine(1, "cpu", workers * threads, 1 << 40)
    job = Job(decoder_config(config), tokens, rows * workers)
    counted = predict_memory(job, plan, this_machine(machine, workers=workers))
    total = sum(size for name, size in counted.lines.items() if name != "libraries")
    return (peak_bytes("cpu") - before) / total


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


def write(file: object, entry: dict) -> None:
    """A line, at once."""
    file.write(json.dumps(entry) + "\n")  # type: ignore[attr-defined]
    file.flush()  # type: ignore[attr-defined]


if __name__ == "__main__":
    folder, kind, *numbers, seconds = sys.argv[1:]
    workers, rank, threads, cores = map(int, numbers)
    work(Path(folder), kind, workers, rank, threads, cores, float(seconds))
