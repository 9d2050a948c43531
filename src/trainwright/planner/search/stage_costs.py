"""What each layer costs on each stage's device: the numbers that layers are shared out by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainwright.planner.candidate import Candidate
from trainwright.planner.cluster.describe import Cluster, Pool
from trainwright.planner.cluster.topology import route
from trainwright.planner.cost.calls import Call
from trainwright.planner.cost.collectives import seconds as collective_seconds
from trainwright.planner.cost.measured import kernels_for
from trainwright.planner.cost.stage import stage_times
from trainwright.planner.job import Job
from trainwright.planner.memory import ELEMENT_BYTES, layer_bytes
from trainwright.planner.parameters import Weight, stage_weights
from trainwright.planner.plan import Plan
from trainwright.planner.search.columns import layer_kinds, plan_of
from trainwright.planner.search.stages import Array, Stages, split_stages

_ROOM = 0.9  # of a device's memory, for what is counted here


def model_seconds(job: Job, like: Candidate, pool: Pool) -> float:
    """Of a row through the whole model and back, on one device: what pools are compared by."""
    return float(_layer_seconds(job, plan_of(like), Cluster("alone", (pool,)), pool, 0).sum())


def with_split_layers(job: Job, plan: Plan, cluster: Cluster) -> Plan:
    """`plan` with the layers of each stage by their costs; as it is where no split fits.

    With several stages a rank it stays as it is: what is said of them holds for one.
    """
    if plan.pp == 1 or plan.virtual_stages > 1:
        return plan
    layers = split_stages(stage_costs(job, plan, cluster), plan.accumulation)
    return plan if layers is None else replace(plan, stage_layers=layers)


def stage_costs(job: Job, plan: Plan, cluster: Cluster) -> Stages:
    """Seconds of layers, and bytes of states and activations, of a plan with one stage a rank.

    A stage on several pools is as slow and has as little memory as the worst of them.
    """
    block = plan.world_size // plan.pp
    tokens = plan.micro_batch * plan.sequence_length / plan.cp
    states = _layer_states(job, plan)
    seconds, memory, limits = [], [], []
    known: dict[tuple[object, ...], Array] = {}
    for stage in range(plan.pp):
        own = replace(plan, recompute=plan.stage_recompute(stage), recompute_by_stage=())
        ranks = range(stage * block, (stage + 1) * block)
        pools = {pool.name: pool for pool in map(cluster.pool_of, ranks)}
        kind = (*pools, own.recompute)
        if kind not in known:
            every = [_layer_seconds(job, own, cluster, each, stage) for each in pools.values()]
            known[kind] = np.max(every, axis=0)
        seconds.append(known[kind])
        under_way = min(plan.accumulation, plan.pp - stage)
        memory.append(states + under_way * tokens * _kept(job, own))
        limits.append(_ROOM * min(pool.device.memory_bytes for pool in pools.values()))
    return Stages(np.array(seconds), np.array(memory), np.array(limits))


def _one_by_one(job: Job, plan: Plan) -> Plan:
    """`plan` with a stage for each layer."""
    layers = job.config.num_layers
    each = (1,) * layers if layers > 1 else ()
    return replace(plan, pp=layers, virtual_stages=1, schedule="1f1b", stage_layers=each)


def _layer_seconds(job: Job, plan: Plan, cluster: Cluster, pool: Pool, stage: int) -> Array:
    """Of each layer there and back on a pool's devices, by the cost model, [layers]."""
    alone, kernels = _one_by_one(job, plan), kernels_for(pool, plan)

    def seconds(call: Call) -> float:
        way = route(cluster, plan, call.dimension, stage)
        return call.times * collective_seconds(call.kind, call.size, way)

    def taken(layer: int) -> float:
        return stage_times(job, alone, layer, kernels, seconds).all.total

    last = job.config.num_layers - 1
    found = np.empty(last + 1)
    for first, layers in layer_kinds(job.config, within=range(1, last)).items():
        found[layers] = taken(first)
    found[0], found[last] = taken(0), taken(last)
    return found


def _layer_states(job: Job, plan: Plan) -> Array:
    """Bytes of each layer's weights, gradients and optimizer state, [layers]."""
    alone = _one_by_one(job, plan)
    every = (stage_weights(job.config, alone, layer) for layer in range(job.config.num_layers))
    return np.array(
        [sum(_state_bytes(job, plan, weight) for group in own for weight in group) for own in every]
    )


def _kept(job: Job, plan: Plan) -> Array:
    """Bytes of a token that each layer keeps until its backward pass, [layers]."""
    every = range(job.config.num_layers)
    return np.array([layer_bytes(job.config, plan, n, plan.layer_recompute(n)) for n in every])


def _state_bytes(job: Job, plan: Plan, weight: Weight) -> float:
    """Of a weight, its gradient and its optimizer's state, and of what is gathered of it."""
    stack, element = job.stack, ELEMENT_BYTES[plan.precision]
    held = stack.weight_bytes + stack.gradient_bytes + stack.optimizer_bytes
    if plan.dp_shard == 1:
        return held * weight.elements(plan)
    whole = element * weight.elements(plan) if plan.zero < 3 else 0.0
    if plan.zero == 1 and plan.accumulation > 1:
        whole += stack.gradient_bytes * weight.elements(plan)
    return held * weight.shard(plan) + whole
