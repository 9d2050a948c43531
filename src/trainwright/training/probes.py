"""Whole steps of a small model under a few plans: what no sum of kernels tells of a machine.

Kernels are measured one by one, and a step has more: the caches are cold, gradients are made whole,
workers wait for each other's slowest moments, an allocator keeps holes. What a step takes and holds
beyond its parts is measured here, and what is foretold of other plans leans towards it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainwright.models.families import decoder_config, new_hf_config
from trainwright.parallel.world import World
from trainwright.planner.cluster.calibration import Calibration
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.residual import features
from trainwright.planner.cost.step import step_time
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine, Plan
from trainwright.recipe.schema import Recipe
from trainwright.resilience.out_of_memory import peak_bytes
from trainwright.training.sameness import Trial, made_batch

_SHAPE = {
    "vocab_size": 16384,  # a chunk of the head's logits is full, as in larger models
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}
_SEQUENCE, _ROWS, _MICRO_BATCH, _STEPS = 256, 16, 4, 3
_MOST_OFF = math.log(3.0)  # beyond, it says more of what was not measured than of the machine


def probe_plans(workers: int, threads: int) -> Iterator[Plan]:
    """A plan for each way to use so many workers of a CPU."""
    common = replace(
        Plan.alone(),
        world_size=workers,
        threads=threads,
        precision="bf16",
        micro_batch=_MICRO_BATCH,
        sequence_length=_SEQUENCE,
    )
    ways: list[dict[str, Any]] = [{}]
    if workers > 1:
        # The first one's memory is measured: later ones find a heap that has grown already.
        ways = [{"dp_shard": workers, "zero": 3}, {"tp": workers}, {"dp_replicate": workers}]
        layers = _SHAPE["num_hidden_layers"] // workers
        ways.append({"pp": workers, "stage_layers": (layers,) * workers})
    for way in ways:
        plan = replace(common, **way)
        yield replace(plan, accumulation=_ROWS // (plan.data_ranks * _MICRO_BATCH))


def run_probe(plan: Plan) -> tuple[float, int]:
    """Train a few steps: seconds of one, without the first, and this process's peak in bytes.

    Collective, in every worker alike.
    """
    config = new_hf_config("llama", _SHAPE, _SHAPE["vocab_size"])
    recipe = Recipe.model_validate(
        {
            "name": "probe",
            "model": {"family": "llama", "config": _SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": _SEQUENCE},
            "training": {"steps": _STEPS, "batch_sequences": _ROWS},
        }
    )
    rank = dist.get_rank() if plan.world_size > 1 else 0
    trial = Trial(
        recipe, config, plan, World(rank, plan.world_size, torch.device("cpu")), rows=_ROWS
    )
    seconds = []
    for index in range(_STEPS):
        started = time.perf_counter()
        trial.train(index)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), peak_bytes("cpu")


def holes_of(plan: Plan, held: float) -> float:
    """What a worker held beyond what is counted, as a share of it: `held` bytes by the probe."""
    machine = Machine(1, "cpu", plan.world_size * plan.threads, 1 << 40)
    counted = predict_memory(probe_job(), plan, this_machine(machine, workers=plan.world_size))
    total = sum(size for name, size in counted.lines.items() if name != "libraries")
    return max(0.0, held / total - 1)


def with_lessons(known: Calibration, machine: Machine) -> Calibration:
    """With what each probe's step took over what its parts are measured to take by now."""
    plain = replace(
        known, observed=(), crowds=tuple(replace(crowd, probes=()) for crowd in known.crowds)
    )
    for crowd in known.crowds:
        cluster = this_machine(machine, plain, workers=crowd.workers)
        probes = []
        for probe in crowd.probes:
            plan = Plan.from_json(probe.plan)
            foretold = step_time(probe_job(), plan, cluster, simulated=False).total
            ratio = math.log(probe.seconds / foretold)
            ratio = max(-_MOST_OFF, min(ratio, _MOST_OFF))
            probes.append(replace(probe, features=features(probe_job(), plan), log_ratio=ratio))
        known = known.added(replace(crowd, probes=tuple(probes)))
    return known


def probe_job() -> Job:
    """What the probes train."""
    vocabulary = int(_SHAPE["vocab_size"])
    config = decoder_config(new_hf_config("llama", _SHAPE, vocabulary))
    share = made_share(_ROWS, _SEQUENCE, vocabulary)
    return Job(config, _SEQUENCE, _ROWS, visible_share=share)


def made_share(rows: int, sequence: int, vocabulary: int) -> float:
    """The share of the causal square that the made-up documents of a `Trial`'s rows see."""
    batch = made_batch(0, rows=rows, sequence=sequence, vocabulary=vocabulary, seed=0)
    assert batch.segment_ids is not None
    counts = (np.unique(row, return_counts=True)[1].astype(float) for row in batch.segment_ids)
    return float(np.mean([(each**2).sum() / sequence**2 for each in counts]))
