"""What a recipe asks for and what it leaves open: the beginning of a search. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.models.families import DecoderConfig
from trainwright.planner.beside import Beside, own_passes
from trainwright.planner.candidate import Candidate, candidate_of
from trainwright.planner.cluster.calibration import Calibration
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine
from trainwright.planner.search.grid import FIELDS, GIVEN
from trainwright.planner.stacks import TRAINWRIGHT, Stack
from trainwright.recipe.schema import Recipe

_OF_PARALLEL = {*FIELDS, *GIVEN} - {"world", "recompute"}


@dataclass(frozen=True)
class Asked:
    """A job, what is not searched of it, and the plan's fields that are given; for `rank`."""

    job: Job
    like: Candidate
    fixed: Mapping[str, Any]


def asked_of(
    recipe: Recipe,
    config: DecoderConfig,
    cluster: Cluster,
    *,
    native: bool | None = True,
    beside: Beside | None = None,
    has_compiler: bool | None = None,
    stack: Stack = TRAINWRIGHT,
) -> Asked:
    """What `recipe` asks for: keys that it does not have, or that are null or `auto`, are open."""
    kind = cluster.pools[0].device
    like = candidate_of(
        recipe.parallel,
        recipe.training,
        world=cluster.devices,
        optimizer=recipe.optimizer.name,
        sequence_length=recipe.data.sequence_length,
        model=config,
        native=native,
        device="cpu" if kind.kind == "cpu" else "cuda",
        has_float8="float8" in kind.peak_flops,
        has_compiler=has_compiler,
        adapter=recipe.adapter,
        objective=recipe.objective,
        beside=beside,
    )
    job = Job(
        config,
        recipe.data.sequence_length,
        like.rows or 0,
        optimizer=recipe.optimizer.name,
        adapter=recipe.adapter,
        beside=like.beside,
        own_passes=own_passes(recipe.objective, adapted=recipe.adapter is not None),
        stack=stack,
    )
    return Asked(job, like, _fixed(recipe))


def _fixed(recipe: Recipe) -> dict[str, Any]:
    parallel, training = recipe.parallel, recipe.training
    given = {name: getattr(parallel, name) for name in parallel.model_fields_set & _OF_PARALLEL}
    fixed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value not in (None, "auto")
    }
    if parallel.workers != "auto":
        fixed["world_size"] = parallel.workers
    if "recompute" in training.model_fields_set and training.recompute != "auto":
        fixed["recompute"] = training.recompute
    if parallel.threads != "auto":
        fixed["threads"] = parallel.threads
    return {**fixed, "activation_offload": training.activation_offload}


def machines_here(machine: Machine, calibration: Calibration | None = None) -> list[Cluster]:
    """The machine at hand in every way to divide it: on a CPU from one worker to one a core."""
    if machine.device_kind == "cpu" and not machine.launched:
        counts = range(1, machine.cores + 1)
        return [this_machine(machine, calibration, workers=workers) for workers in counts]
    return [this_machine(machine, calibration)]


def like_of(job: Job, cluster: Cluster) -> Candidate:
    """What is not searched, of a job that no recipe tells of: bf16 on GPUs, fp32 on CPUs."""
    kind = cluster.pools[0].device
    return Candidate(
        world=cluster.devices,
        model=job.config,
        native=True,
        adapter=job.adapter,
        beside=job.beside,
        optimizer=job.optimizer,
        precision="fp32" if kind.kind == "cpu" else "bf16",
        sequence_length=job.sequence_length,
        rows=job.batch_sequences,
        device="cpu" if kind.kind == "cpu" else "cuda",
        has_float8="float8" in kind.peak_flops,
        has_compiler=True if kind.kind != "cpu" else None,
    )
