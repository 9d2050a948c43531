"""A plan that does not fit into memory, made to fit: recomputing where it costs least. No torch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cluster.topology import route
from trainwright.planner.cost.calls import Call
from trainwright.planner.cost.collectives import seconds as collective_seconds
from trainwright.planner.cost.measured import kernels_for
from trainwright.planner.cost.memory import predict_memory, rank_memory
from trainwright.planner.cost.stage import stage_times
from trainwright.planner.job import Job
from trainwright.planner.memory import activation_bytes
from trainwright.planner.parameters import layers_of, stages_of
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.search.recompute_program import Added, least_recompute

_ROUNDS = 8  # of giving back to the budget what the prediction of memory asks for beyond it


def fit_recompute(
    job: Job, plan: Plan, cluster: Cluster, limit: float | None = None
) -> Plan | None:
    """`plan` with the policies by layer that fit its devices and add the fewest seconds.

    `limit` are bytes of a device, where it may not have all of its own. What `plan` itself
    recomputes does not count; it is never slower than `full` everywhere. None where not even that
    fits. Raises IndexError where the cluster has fewer devices than the plan has workers.
    """
    plan = replace(plan, recompute="none", recompute_by_stage=(), recompute_by_layer=())

    def excess(candidate: Plan) -> tuple[float, int]:
        """Bytes beyond the limit, and the rank that they are on."""
        memory = predict_memory(job, candidate, cluster)
        return memory.total.value - min(limit or memory.limit, memory.limit), memory.pp_rank

    if excess(plan)[0] <= 0:
        return plan
    full = replace(plan, recompute="full")
    if excess(full)[0] > 0:
        return None
    added = recompute_seconds(job, plan, cluster)
    resting = [rank_memory(job, plan, pp_rank) for pp_rank in range(plan.pp)]
    own = [_device_bytes(plan, cluster, pp_rank) for pp_rank in range(plan.pp)]
    beyond = 0.0  # what the prediction counts besides
    for _ in range(_ROUNDS):
        rooms = [
            min(limit or size, size) - each.resting - each.logits - beyond
            for size, each in zip(own, resting, strict=True)
        ]
        found = least_recompute(job.config, plan, rooms.__getitem__, added)
        if found is None:
            break
        over, rank = excess(found)
        if over <= 0:
            return found
        # What the choice leaves of its room would not be missed.
        held = plan.micro_batch * activation_bytes(job.config, found, rank)
        beyond += over + max(0.0, rooms[rank] - held)
    return full


def _device_bytes(plan: Plan, cluster: Cluster, pp_rank: int) -> float:
    """The least memory of a pipeline rank's devices."""
    share = plan.world_size // plan.pp
    ranks = range(pp_rank * share, (pp_rank + 1) * share)
    return min({cluster.pool_of(rank).device.memory_bytes for rank in ranks})


def recompute_seconds(job: Job, plan: Plan, cluster: Cluster) -> Added:
    """What a layer's policy adds to a micro-batch by the cost model, computing and sending."""
    config = job.config
    ranks = {
        layer: (stage, pp_rank)
        for pp_rank in range(plan.pp)
        for stage in stages_of(plan, pp_rank)
        for layer in layers_of(config, plan, stage)
    }
    plain: list[Recompute] = ["none"] * config.num_layers

    def total(layer: int, policy: Recompute) -> float:
        stage, pp_rank = ranks[layer]
        pool = cluster.pool_of(pp_rank * plan.world_size // plan.pp)
        by_layer = (*plain[:layer], policy, *plain[layer + 1 :])

        def seconds(call: Call) -> float:
            way = route(cluster, plan, call.dimension, pp_rank)
            return call.times * collective_seconds(call.kind, call.size, way)

        own = replace(plan, recompute_by_stage=(), recompute_by_layer=by_layer)
        return stage_times(job, own, stage, kernels_for(pool, plan), seconds).all.total

    @cache
    def of_kind(sparse: bool, window: int | None, stage: int, policy: Recompute) -> float:
        layer = next(
            layer
            for layer in layers_of(config, plan, stage)
            if (config.is_sparse(layer), config.layer_windows[layer]) == (sparse, window)
        )
        return max(0.0, total(layer, policy) - total(layer, "none"))

    def added(layer: int, policy: Recompute) -> float:
        kind = (config.is_sparse(layer), config.layer_windows[layer])
        return of_kind(*kind, ranks[layer][0], policy)

    return added
