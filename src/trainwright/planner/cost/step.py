"""A plan's step in seconds, bytes, joules and dollars: where all that is known comes together.

Stages are told by their kernels and collectives (`cost.stage`), set in time by the schedule's own
actions, and followed by what happens once a step: gradients over the replicas, the update, and what
is constant. Where replicas or stages lie on unequal devices each is told by its own, and the step
is as long as the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from trainwright.planner.beside import plan_beside
from trainwright.planner.cluster.describe import Cluster, Pool
from trainwright.planner.cluster.topology import Route, boundary, route
from trainwright.planner.cost.calls import Call, boundary_bytes
from trainwright.planner.cost.collectives import seconds as collective_seconds
from trainwright.planner.cost.energy import energy_of
from trainwright.planner.cost.kernels import Kernels, peak
from trainwright.planner.cost.measured import kernels_for, measured_links
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.operators import Product
from trainwright.planner.cost.pipeline import pipeline_time
from trainwright.planner.cost.prediction import Interval, Prediction
from trainwright.planner.cost.residual import correction
from trainwright.planner.cost.stage import Seconds, StageTimes, Work, stage_times
from trainwright.planner.job import Job
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.parameters import Weight, layers_of, stage_weights, stages_of
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import placement
from trainwright.planner.shapes import flops_per_token
from trainwright.planner.timeline import Timeline

_CLIP_BYTES = 4  # a gradient read once more, for its norm
_MUON_STEPS = 5  # of Newton and Schulz; three products each (Jordan 2024)


@dataclass(frozen=True)
class Step:
    """A step in seconds: `busiest` is what its longest working rank does and waits for.

    `total` is `busiest.total` + `idle` + `optimizer` + `constant`.
    """

    total: float
    busiest: Work
    idle: float
    optimizer: float
    constant: float
    timeline: Timeline | None

    def scaled(self, factor: float) -> Step:
        """All seconds but the timeline's times `factor`."""
        return Step(
            total=factor * self.total,
            busiest=Work().add(self.busiest, factor),
            idle=factor * self.idle,
            optimizer=factor * self.optimizer,
            constant=factor * self.constant,
            timeline=self.timeline,
        )


@dataclass(frozen=True)
class _Replica:
    """A replica's micro-batches on its devices: seconds until they are through, and of what."""

    seconds: float
    busiest: Work  # of all micro-batches, on the rank that works longest
    last_backward: float  # of that rank's last micro-batch
    timeline: Timeline | None


def predict(job: Job, plan: Plan, cluster: Cluster, *, simulated: bool = True) -> Prediction:
    """What a step of `plan` costs, in all that is asked for.

    `simulated` keeps the pipeline's timeline. Raises IndexError where the cluster has fewer devices
    than the plan has workers.
    """
    step = step_time(job, plan, cluster, simulated=simulated)
    rates = [pool.rates for pool in _pools(cluster, 0, plan.world_size)]
    lean = correction(cluster.observed, job, plan, max(each.spread for each in rates))
    step = step.scaled(lean.factor * max(each.steps for each in rates))
    energy = energy_of(plan, cluster, step.total, step.busiest, step.optimizer)
    return Prediction(
        plan=plan,
        step_seconds=Interval.around(step.total, lean.spread),
        memory=predict_memory(job, plan, cluster),
        compute=step.busiest.compute,
        exposed=step.busiest.exposed,
        idle=step.idle,
        optimizer=step.optimizer,
        constant=step.constant,
        model_flops=3 * flops_per_token(job.config, job.sequence_length) * plan.batch_tokens,
        peak_flops=sum(
            peak(pool.device, plan.precision) * count
            for pool, count in _shares(cluster, plan.world_size)
        ),
        joules=energy.joules,
        dollars=energy.dollars,
        grams=energy.grams,
        timeline=step.timeline,
        source=", ".join(dict.fromkeys(each.source for each in rates)),
    )


def step_time(job: Job, plan: Plan, cluster: Cluster, *, simulated: bool = True) -> Step:
    """The seconds alone; see `predict`."""
    links = _Links(cluster, plan)
    replicas = [
        _replica(job, plan, pools, plan.accumulation_of(index), links, simulated)
        for index, pools in _different_replicas(plan, cluster)
    ]
    slowest = max(replicas, key=lambda each: each.seconds)
    reduced = max(_reduction(job, plan, rank, links, slowest) for rank in range(plan.pp))
    update = max(
        _update(job, plan, rank, kernels_for(pool, plan))
        for rank in range(plan.pp)
        for pool in _pools(cluster, *_block(plan, rank))
    )
    constant = max(pool.rates.step_seconds for pool in _pools(cluster, 0, plan.world_size))
    constant += links.seconds(Call("world", "all_reduce", 40.0), None)
    busiest = slowest.busiest.add(Work())
    busiest.wait("fsdp" if plan.dp_shard > 1 else "replicas", reduced)
    idle = slowest.seconds - slowest.busiest.total
    total = slowest.seconds + reduced + update + constant
    return Step(total, busiest, idle, update, constant, slowest.timeline)


class _Links:
    """Seconds of collectives along a plan's dimensions; each route is found once."""

    def __init__(self, cluster: Cluster, plan: Plan) -> None:
        self.cluster, self.plan = cluster, plan
        self.measured = measured_links(cluster, plan)
        self._routes: dict[tuple[str, int | None], Route] = {}
        self._known: dict[tuple[Call, int | None], float] = {}

    def seconds(self, call: Call, pp_rank: int | None) -> float:
        """Of all the call's times, within a pipeline rank."""
        key = (call, pp_rank)
        if key not in self._known:
            place = (call.dimension, pp_rank)
            if place not in self._routes:
                self._routes[place] = route(self.cluster, self.plan, call.dimension, pp_rank)
            way, found = self._routes[place], None
            if self.measured is not None:
                found = self.measured.collective(call, way.workers)
            if found is None:
                found = call.times * collective_seconds(call.kind, call.size, way)
            self._known[key] = found
        return self._known[key]

    def within(self, pp_rank: int) -> Seconds:
        """The same as a function of the call alone."""
        return lambda call: self.seconds(call, pp_rank)

    def transfer(self, job: Job, first: int, second: int) -> float:
        """A micro-batch's stream from one pipeline rank to another."""
        if first == second:
            return 0.0
        size, found = boundary_bytes(job, self.plan), None
        if self.measured is not None:
            found = self.measured.collective(Call("pp", "send", size), 2)
        if found is not None:
            return found
        way = boundary(self.cluster, self.plan, first, second)
        return collective_seconds("send", size, way)


def _different_replicas(plan: Plan, cluster: Cluster) -> Iterator[tuple[int, list[list[Pool]]]]:
    """Replicas that differ in their devices or rows: an index of each, and its pools by rank."""
    block, own = plan.world_size // plan.pp, plan.world_size // plan.pp // plan.dp_replicate
    if len(cluster.pools) == 1 and not plan.rows_by_replica:
        yield 0, [list(cluster.pools)] * plan.pp
        return
    seen = set()
    for index in range(plan.dp_replicate):
        starts = (rank * block + index * own for rank in range(plan.pp))
        pools = [_pools(cluster, start, own) for start in starts]
        key = (tuple(tuple(p.name for p in each) for each in pools), plan.accumulation_of(index))
        if key not in seen:
            seen.add(key)
            yield index, pools


def _pools(cluster: Cluster, start: int, count: int) -> list[Pool]:
    """The pools of a range of ranks."""
    found, begins = [], 0
    for pool in cluster.pools:
        if begins < start + count and start < begins + pool.devices:
            found.append(pool)
        begins += pool.devices
    return found


def _shares(cluster: Cluster, world: int) -> Iterator[tuple[Pool, int]]:
    """Pools and how many of the first `world` devices each has."""
    for pool in cluster.pools:
        count = min(world, pool.devices)
        if count:
            yield pool, count
        world -= count


def _block(plan: Plan, pp_rank: int) -> tuple[int, int]:
    """First rank and number of ranks of a pipeline rank."""
    block = plan.world_size // plan.pp
    return pp_rank * block, block


def _replica(
    job: Job,
    plan: Plan,
    pools: list[list[Pool]],
    micro_batches: int,
    links: _Links,
    simulated: bool,
) -> _Replica:
    """Micro-batches through the stages of a replica; a rank on several pools waits for the last."""
    ranks = placement(plan.schedule, plan.pp, plan.virtual_stages) if plan.pp > 1 else (0,)
    times: list[StageTimes] = []
    known: dict[tuple[object, ...], StageTimes] = {}
    for stage, rank in enumerate(ranks):
        key = (*_kinds(job, plan, stage), tuple(pool.name for pool in pools[rank]), rank)
        if plan.pp > 1 and len(links.cluster.pools) == 1:
            key = key[:-1]
        if key not in known:
            known[key] = max(
                (
                    stage_times(job, plan, stage, kernels_for(pool, plan), links.within(rank))
                    for pool in pools[rank]
                ),
                key=lambda each: each.all.total,
            )
        times.append(known[key])
    works = [Work() for _ in range(plan.pp)]
    for stage, rank in enumerate(ranks):
        works[rank] = works[rank].add(times[stage].all, micro_batches)
    busiest = max(works, key=lambda work: work.total)
    rank = works.index(busiest)
    last = sum(
        times[stage].backward_input.total + times[stage].backward_weight.total
        for stage in stages_of(plan, rank)
    )
    frozen = _frozen(job, plan, ranks, times, pools, links)
    beside = frozen.total * (micro_batches + plan.pp - 1)
    busiest = busiest.add(frozen, micro_batches)
    if plan.pp == 1:
        return _Replica(busiest.total, busiest, last, None)
    transfers = [links.transfer(job, here, there) for here, there in pairwise(ranks)]
    taken, timeline = pipeline_time(plan, micro_batches, times, transfers, whole=simulated)
    # Workers that take turns on a core go faster while others idle, until every core is busy.
    share = min(kernels_for(pool, plan).share for each in pools for pool in each)
    if share < 1:
        taken = max(taken * share, sum(work.total for work in works) / plan.pp)
        busiest = Work().add(busiest, min(1.0, taken / busiest.total))
    return _Replica(taken + beside, busiest, last, timeline)


def _frozen(
    job: Job,
    plan: Plan,
    ranks: Sequence[int],
    times: list[StageTimes],
    pools: list[list[Pool]],
    links: _Links,
) -> Work:
    """Forward passes of what is not trained, a micro-batch, on the rank that is longest at it."""
    works = [Work() for _ in range(plan.pp)]
    if job.own_passes:
        for rank, own in zip(ranks, times, strict=True):
            works[rank] = works[rank].add(own.forward, job.own_passes)
    if job.beside is not None and job.beside.stays and job.beside.config is not None:
        config = job.beside.config
        other, there = replace(job, config=config, adapter=None), plan_beside(plan, config)
        for stage, rank in enumerate(ranks):
            kernels = min((kernels_for(each, plan) for each in pools[rank]), key=_rate)
            found = stage_times(other, there, stage, kernels, links.within(rank))
            works[rank] = works[rank].add(found.forward)
    return max(works, key=lambda work: work.total)


def _rate(kernels: Kernels) -> float:
    return max(kernels.device.peak_flops.values()) * kernels.rates.products


def _kinds(job: Job, plan: Plan, stage: int) -> tuple[object, ...]:
    """What makes two stages equal: their layers' kinds, their policies and their ends."""
    layers = layers_of(job.config, plan, stage)
    policies = plan.recompute_by_layer
    return (
        tuple((job.config.is_sparse(n), job.config.layer_windows[n]) for n in layers),
        tuple(policies[n] for n in layers) if policies else plan.stage_recompute(stage),
        stage == 0,
        stage == plan.stages - 1,
    )


def _reduction(job: Job, plan: Plan, pp_rank: int, links: _Links, slowest: _Replica) -> float:
    """Exposed seconds of what is sent once a step: gradients, weights of ZeRO-1 and 2, ties."""
    stack, weights = job.stack, _weights(job, plan, pp_rank)
    if job.adapter is not None:
        whole = state_elements(job, plan, pp_rank)
    else:
        whole = float(sum(weight.elements(plan) for weight in weights))
    backward: list[Call] = []
    forward: list[Call] = []
    size = stack.gradient_bytes * whole
    if plan.dp_shard == 1:
        backward.append(Call("replicas", "all_reduce", size))
    else:
        shards = plan.dp_shard * plan.cp
        if plan.zero < 3:
            forward.append(Call("fsdp", "all_gather", ELEMENT_BYTES[plan.precision] * whole))
        if plan.zero == 1:
            backward.append(Call("fsdp", "reduce_scatter", size))
        if plan.dp_replicate > 1:
            backward.append(Call("dp_replicate", "all_reduce", size / shards))
    taken = sum(links.seconds(call, pp_rank) for call in backward)
    if stack.overlaps_gradients:
        # All but the first layers' gradients, which come last, while the others are made.
        whole, taken = taken, max(taken - slowest.last_backward, taken / (1 + len(weights) // 8))
        if links.measured is not None:
            taken = max(taken, whole * (1 - links.measured.crowd.hidden_share))
    gathered = sum(links.seconds(call, pp_rank) for call in forward)
    if stack.overlaps_gathers and plan.zero < 3:
        gathered *= stack.exposed_gathers
    tied = 0.0
    if plan.pp > 1 and job.config.tied_embeddings and pp_rank in (0, plan.pp - 1):
        table = Weight((job.config.vocab_size, job.config.hidden_size), 0, "outer")
        way = boundary(links.cluster, plan, 0, plan.pp - 1)
        tied = collective_seconds("all_reduce", 4.0 * table.shard(plan), way)
    parts = 0.0
    if plan.whole and job.adapter is None:
        # Of what tp leaves whole each worker has seen its own tokens only.
        partial = sum(weight.shard(plan) for weight in weights if weight.partial(plan))
        parts = links.seconds(Call("tp", "all_reduce", stack.gradient_bytes * partial), pp_rank)
    return taken + gathered + tied + parts


def _update(job: Job, plan: Plan, pp_rank: int, kernels: Kernels) -> float:
    """Seconds of clipping and of the optimizer, on a device's own part of the states."""
    if job.adapter is not None:
        own = state_elements(job, plan, pp_rank)
    else:
        weights = _weights(job, plan, pp_rank)
        divided = plan.dp_shard > 1 and plan.zero > 0
        own = float(sum(w.shard(plan) if divided else w.elements(plan) for w in weights))
    stack = job.stack
    held = stack.weight_bytes + stack.optimizer_bytes
    moved = own * (2 * held + stack.gradient_bytes + _CLIP_BYTES)
    seconds = kernels.elements(moved, 40)
    if job.optimizer == "muon":
        seconds += sum(
            _MUON_STEPS * _newton_schulz(weight, plan, kernels)
            for weight in _weights(job, plan, pp_rank)
            if weight.group != "outer" and len(weight.shape) > 1
        ) / max(1, plan.dp_shard)
    if plan.offload != "none":
        seconds += _host_seconds(own, plan, kernels)
    return seconds


def _newton_schulz(weight: Weight, plan: Plan, kernels: Kernels) -> float:
    *experts, rows, columns = weight.local(plan)
    short, long = sorted((rows, columns))
    many = float(experts[0]) if experts else 1.0
    products = (
        Product(short, short, long),
        Product(short, short, short),
        Product(short, long, short),
    )
    return many * sum(kernels.product(each, "bf16") for each in products)


def _host_seconds(own: float, plan: Plan, kernels: Kernels) -> float:
    """Gradients to the host, weights back, and the update there, where memory is slower."""
    return own * (4 + 4) / kernels.host_bandwidth + own * 28 / kernels.host_memory_bandwidth


def state_elements(job: Job, plan: Plan, pp_rank: int) -> float:
    """Weights that an adapter trains on a worker."""
    assert job.adapter is not None
    rank = job.adapter.rank
    return float(
        sum(
            rank * sum(weight.local(plan))
            for weight in _weights(job, plan, pp_rank)
            if weight.group == "block" and len(weight.shape) == 2
        )
    )


def _weights(job: Job, plan: Plan, pp_rank: int) -> list[Weight]:
    return [
        weight
        for stage in stages_of(plan, pp_rank)
        for group in stage_weights(job.config, plan, stage)
        for weight in group
    ]
