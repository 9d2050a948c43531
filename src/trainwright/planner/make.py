"""From a recipe and a machine to a Plan: what is left out is derived, what is illegal refused."""

from __future__ import annotations

import math
from dataclasses import replace

from trainwright.errors import Mistake, UserError
from trainwright.models.families import DecoderConfig
from trainwright.planner import memory
from trainwright.planner.advice import Advice, advise
from trainwright.planner.beside import Beside, own_passes
from trainwright.planner.budget import Budget, memory_budget
from trainwright.planner.candidate import Candidate, candidate_of
from trainwright.planner.cluster.calibration import read_calibration
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.explain import in_bytes
from trainwright.planner.job import Job
from trainwright.planner.known_model import known_config, known_native
from trainwright.planner.layout import divisors
from trainwright.planner.legality import beside_mistakes, legality_mistakes
from trainwright.planner.plan import Machine, Plan
from trainwright.planner.schedules import schedule_mistakes, splits_backward
from trainwright.planner.shapes import flops_per_token
from trainwright.recipe.schema import DataSection, Parallel, Recipe, Training

# A micro-batch on a CPU gains nothing beyond this, and holds memory that caches want.
_CPU_MOST_ROWS, _MOST_TOKENS = 16, 16_384
_MEMORY_SHARE = 0.5  # of the memory, for what the closed formulas know
# Of the memory, where recomputing is what it takes to fit: a CPU's allocator leaves more holes.
_FILLED = {"cuda": 0.9, "cpu": 0.75}
_WORKERS_A_CORE = 8  # more on a CPU are a mistake, or meant for another machine
# Micro-batches for each pipeline worker: a fifth of the step is then the most that 1F1B idles.
_MICRO_BATCHES_A_STAGE = 4

# When compiling pays on a CPU: measured on one with AMX, rounded to the careful side.
_COMPILE_SECONDS = 40.0
_COMPILE_GAIN = 1.2
_CPU_FLOPS_PER_CORE = 0.15e12


def make_plan(
    recipe: Recipe,
    machine: Machine,
    config: DecoderConfig | None = None,
    steps: int | None = None,
    native: bool | None = None,
    beside: Beside | None = None,
) -> Plan:
    """The plan of `recipe` on `machine`.

    `config` is the model where the caller knows it better than the recipe tells (a hub id),
    `beside` the reference or teacher likewise, and `steps` the length of the run where only the
    data tells (epochs); `native` says whether the model is one of our families, where that is
    known. Raises `UserError` with every reason why the recipe cannot run there, each with the
    nearest value that can.
    """
    config = config or known_config(recipe.model, recipe.tokenizer, recipe.objective)
    try:
        return _derived(recipe, machine, config, steps, native, beside)
    except _TooLargeError as error:
        assert config is not None
        found = memory_advice(recipe, error.plan, machine, config, beside)
        raise UserError(_too_large(error, found)) from None


def memory_advice(
    recipe: Recipe,
    plan: Plan,
    machine: Machine,
    config: DecoderConfig,
    beside: Beside | None = None,
    limit: float | None = None,
) -> list[Advice]:
    """The shortest changes of `recipe` with which a worker holds at most `limit`, best first.

    `plan` is its plan on `machine`, of whose free memory a worker has its share where no limit is
    given; `beside` is as in `make_plan`.
    """

    def estimate(changed: Recipe) -> Budget:
        other = beside
        if other is not None:
            other = replace(other, stays=not changed.objective.cache_reference)
        there = _derived(changed, machine, config, None, True, other)
        return memory_budget(changed, there, config, machine, other)

    return advise(recipe, plan, estimate, limit)


def _derived(
    recipe: Recipe,
    machine: Machine,
    config: DecoderConfig | None,
    steps: int | None,
    native: bool | None,
    beside: Beside | None,
) -> Plan:
    """The plan, where the recipe is legal and the states fit."""
    if native is None:
        native = True if config is not None else known_native(recipe.model)
    candidate = candidate_of(
        recipe.parallel,
        recipe.training,
        world=workers_of(recipe, machine),
        optimizer=recipe.optimizer.name,
        sequence_length=recipe.data.sequence_length,
        model=config,
        native=native,
        device=machine.device_kind,
        has_float8=machine.has_float8,
        has_compiler=machine.can_compile,
        adapter=recipe.adapter,
        objective=recipe.objective,
        beside=beside,
    )
    mistakes = [*batch_tokens_mistakes(recipe.training, recipe.data), *legality_mistakes(candidate)]
    mistakes += beside_mistakes(candidate)
    if recipe.training.recompute == "auto" and native is False:
        what = "`recompute: auto` counts what layers hold, and this model is of no family of ours"
        mistakes.append(Mistake(what, "write `recompute: full`", key="training.recompute"))
    if mistakes:
        raise UserError(mistakes)
    micro, own = candidate.micro_batch, candidate.own_rows
    rows = math.gcd(*own)  # a micro-batch divides the rows of every replica
    plan = replace(candidate, micro_batch=1).plan(threads=1, compile=False)
    plan = finished_plan(recipe, plan, machine, config, steps)
    if micro is None:
        most = _most_rows(recipe, plan, machine, rows, candidate)
        micro = max(n for n in divisors(rows) if n <= most)
    elif config is not None:
        _room(recipe, plan, machine, candidate)
    plan = replace(plan, micro_batch=micro, accumulation=max(own) // micro)
    by_part = candidate.recompute_by_stage or candidate.recompute_by_layer
    if recipe.training.recompute == "auto" and config is not None and not by_part:
        return _least_recompute(recipe, plan, machine, candidate)
    return plan


class _TooLargeError(UserError):
    """What a worker holds from step to step is more than it has."""

    def __init__(self, plan: Plan, states: float, own: float) -> None:
        super().__init__("too large")
        self.plan, self.states, self.own = plan, states, own


def _too_large(error: _TooLargeError, found: list[Advice]) -> Mistake:
    on_cpu = error.plan.device == "cpu"
    where = "worker" if on_cpu else "GPU"
    fix = "choose a smaller model, or "
    fix += "fewer workers" if on_cpu and error.plan.dp_shard == 1 else "more workers"
    fix += " with `dp_shard`" if error.plan.dp_shard > 1 or not on_cpu else ""
    if found:
        ways = (f"{advice.change} ({in_bytes(advice.total)} a {where})" for advice in found)
        fix = f"write {', or '.join(ways)}"
    return Mistake(
        f"weights, gradients and optimizer state take {in_bytes(error.states)} a {where}, which "
        f"has {in_bytes(error.own)}",
        fix,
        key="model",
    )


def batch_tokens_mistakes(training: Training, data: DataSection) -> list[Mistake]:
    """A batch in tokens that is no whole number of rows."""
    tokens, unit = training.batch_tokens, data.sequence_length
    if tokens is None or tokens % unit == 0:
        return []
    below, above = tokens // unit * unit, (tokens // unit + 1) * unit
    near = " or ".join(f"`batch_tokens: {n}`" for n in (below, above) if n)
    what = f"{tokens:,} tokens are no whole number of rows of {unit:,} tokens"
    return [Mistake(what, f"write {near}", key="training.batch_tokens")]


def _threads(parallel: Parallel, machine: Machine, world: int) -> int:
    if parallel.threads != "auto":
        return parallel.threads
    here = min(world, machine.devices) if machine.device_kind == "cuda" else world
    return max(1, machine.cores // here)


def workers_of(recipe: Recipe, machine: Machine) -> int:
    """Workers of the recipe on a machine, before any search. Raises `UserError` for too many."""
    workers = recipe.parallel.workers
    if machine.launched:
        if isinstance(workers, int) and machine.launched % workers:
            what = f"a launcher has started {machine.launched} workers"
            fix = "write `workers: auto`, or the launcher's number for one machine"
            raise UserError(Mistake(what, fix, key="parallel.workers"))
        return machine.launched
    if workers == "auto":
        asked, on_cpu = asked_workers(recipe.parallel), machine.device_kind == "cpu"
        if asked > (_WORKERS_A_CORE * machine.cores if on_cpu else machine.devices):
            raise UserError(_too_many(asked, machine))
        return asked if on_cpu else machine.devices
    if machine.device_kind == "cuda" and workers > machine.devices:
        has = "1 GPU" if machine.devices == 1 else f"{machine.devices} GPUs"
        what = f"{workers} workers need a GPU each, and this machine has {has}"
        raise UserError(
            Mistake(what, f"write `workers: {machine.devices}`", key="parallel.workers")
        )
    return workers


def asked_workers(parallel: Parallel) -> int:
    """The fewest workers that the recipe's degrees make; 1 where it gives none."""
    given = (parallel.pp, parallel.cp, parallel.tp, parallel.replicas, parallel.dp_shard)
    asked = math.prod(degree or 1 for degree in given)
    # Experts are dealt out within dp_shard, which is then as large at least.
    return asked if parallel.dp_shard else asked * parallel.ep


def cluster_of(workers: int) -> Machine:
    """One of many machines with eight GPUs of 80 GB, on which a launcher has started `workers`."""
    return Machine(
        devices=8,
        device_kind="cuda",
        cores=64,
        memory_bytes=80 * 10**9,
        can_compile=True,
        launched=workers,
        has_float8=True,
        device_name="NVIDIA H100 80GB HBM3",
    )


def machine_of(cluster: Cluster) -> Machine:
    """One of the machines of `cluster`, all of whose devices a launcher has started a worker on.

    Where they differ, with the least that any of them has.
    """
    kinds = [pool.device for pool in cluster.pools]
    on_cpu = all(kind.kind == "cpu" for kind in kinds)
    return Machine(
        devices=1 if on_cpu else min(pool.devices_per_node for pool in cluster.pools),
        device_kind="cpu" if on_cpu else "cuda",
        cores=min(kind.units for kind in kinds) if on_cpu else 64,
        memory_bytes=int(min(kind.memory_bytes for kind in kinds)),
        can_compile=True,
        launched=cluster.devices,
        has_float8=all("float8" in kind.peak_flops for kind in kinds),
        device_name=kinds[0].name,
    )


def _too_many(asked: int, machine: Machine) -> Mistake:
    if machine.device_kind == "cpu":
        has = f"{machine.cores} cores"
    else:
        has = "1 GPU" if machine.devices == 1 else f"{machine.devices} GPUs"
    return Mistake(
        f"the degrees make {asked:,} workers, and this machine has {has}",
        "start it on enough machines at once, as with torchrun, or write smaller degrees",
        key="parallel",
    )


def _room(recipe: Recipe, plan: Plan, machine: Machine, candidate: Candidate) -> float:
    """Bytes that a worker has for activations. `_TooLargeError` where not even states fit."""
    assert candidate.model is not None
    on_cpu = machine.device_kind == "cpu"
    own = machine.memory_bytes / (plan.world_size if on_cpu else 1)
    budget = memory_budget(recipe, plan, candidate.model, machine, candidate.beside)
    if budget.states > own:
        raise _TooLargeError(plan, budget.states, own)
    return own * _MEMORY_SHARE - budget.states - budget.lines.get("logits", 0.0)


def _most_rows(
    recipe: Recipe, plan: Plan, machine: Machine, rows: int, candidate: Candidate
) -> int:
    """Rows of a micro-batch that fit and keep a pipeline busy; at least 1."""
    config = candidate.model
    room = None if config is None else _room(recipe, plan, machine, candidate)
    most = float("inf")
    if config is None or room is None or machine.device_kind == "cpu":
        most = min(_CPU_MOST_ROWS, max(1, _MOST_TOKENS // plan.sequence_length))
    if config is not None and room is not None:
        most = min(most, room // memory.activation_bytes(config, plan))
    if plan.pp > 1:
        most = min(most, max(1, rows // (_MICRO_BATCHES_A_STAGE * plan.pp)))
        legal = [
            n
            for n in divisors(rows)
            if not schedule_mistakes(plan.schedule, plan.pp, plan.virtual_stages, rows // n)
        ]
        most = min(most, max(legal))
    return max(1, int(min(most, rows)))


def _least_recompute(recipe: Recipe, plan: Plan, machine: Machine, candidate: Candidate) -> Plan:
    """The quickest of the micro-batches that may be, each with as little recompute as fits.

    Where nothing fits, everything is recomputed, in micro-batches of one row.
    """
    # scipy takes a moment to load, and no other plan needs it.
    from trainwright.planner.cost.step import step_time
    from trainwright.planner.search.recompute import fit_recompute

    assert candidate.model is not None and candidate.rows is not None
    job = Job(
        candidate.model,
        plan.sequence_length,
        candidate.rows,
        plan.optimizer,
        candidate.adapter,
        candidate.beside,
        own_passes(recipe.objective, adapted=recipe.adapter is not None),
    )
    cluster = this_machine(machine, read_calibration(machine), workers=plan.world_size)
    limit = _FILLED[plan.device] * cluster.pools[0].device.memory_bytes
    sizes = [plan.micro_batch]
    if candidate.micro_batch is None:
        rows = math.gcd(*candidate.own_rows)
        most = _most_rows(recipe, plan, machine, rows, replace(candidate, model=None))
        sizes = [n for n in divisors(rows) if n <= max(most, plan.micro_batch)]
    own = max(candidate.own_rows)
    plans = [replace(plan, micro_batch=n, accumulation=own // n) for n in sizes]
    fitting = filter(None, (fit_recompute(job, each, cluster, limit) for each in plans))
    quickest = min(fitting, key=lambda each: step_time(job, each, cluster).total, default=None)
    return quickest or replace(plans[0], recompute="full")


def finished_plan(
    recipe: Recipe, plan: Plan, machine: Machine, config: DecoderConfig | None, steps: int | None
) -> Plan:
    """A layout with what does not make it one: threads, compiling, activations in host memory."""
    return replace(
        plan,
        threads=_threads(recipe.parallel, machine, plan.world_size),
        compile=_compiles(recipe, machine, plan, config, steps),
        activation_offload=recipe.training.activation_offload,
    )


def _compiles(
    recipe: Recipe, machine: Machine, plan: Plan, config: DecoderConfig | None, steps: int | None
) -> bool:
    """Whether blocks are compiled: as the recipe says, or where it repays its own time."""
    training = recipe.training
    if training.compile != "auto":
        return training.compile
    policies = plan.recompute_by_layer or plan.recompute_by_stage or (plan.recompute,)
    if any(not isinstance(policy, str) for policy in policies):
        return True  # a memory budget is met by nothing else
    if not machine.can_compile or (plan.pp > 1 and splits_backward(plan.schedule)):
        return False
    if machine.device_kind == "cuda":
        return True
    if plan.tp * plan.cp * plan.ep > 1:
        return False  # collectives cut a block into pieces, whose gain nobody has measured
    tokens = training.tokens
    steps = steps or training.steps
    if steps is not None:
        tokens = steps * recipe.batch_sequences * recipe.data.sequence_length
    if training.precision != "bf16" or config is None or tokens is None:
        return False
    flops = 3 * flops_per_token(config, recipe.data.sequence_length) * tokens
    seconds = flops / (_CPU_FLOPS_PER_CORE * machine.cores)
    return seconds * (1 - 1 / _COMPILE_GAIN) > _COMPILE_SECONDS
