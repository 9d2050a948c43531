"""What candidates are likely to take and to hold, all at once: the order in which to look at them.

The cost model's own kernels and collectives, at the sizes that candidates have in common, put
together by closed formulas instead of a simulation. Nothing is decided by it but the order.
"""

from __future__ import annotations

import numpy as np

from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cost.kernels import Kernels
from trainwright.planner.cost.measured import kernels_for
from trainwright.planner.cost.operators import Operators, head_operators, layer_operators
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.search.columns import Columns, by, plan_of
from trainwright.planner.search.grid import Column
from trainwright.planner.search.stage_costs import model_seconds
from trainwright.planner.traffic import attention_widths

_BACKWARD = 2 / 3  # of a layer's time, there and back
_EXPOSED = 1 / 8  # of what hides in computing, the first or the last part cannot
_BUBBLES = {"1f1b": 1.0, "gpipe": 1.0, "interleaved": 1.0, "zero_bubble": 0.4}  # others next to 0
_HELD = 2e9  # bytes of a chunk of logits, of buffers and holes


def likely_seconds(columns: Columns, cluster: Cluster) -> Column:
    """Seconds of a step, about, [candidates]."""
    grid, layers = columns.grid, columns.job.config.num_layers
    products, attention, elements, head = _kernel_seconds(columns, cluster).T
    full, selective = (grid.is_value("recompute", name) for name in ("full", "selective"))
    forward = products + attention + elements
    blocks = 3 * products + 3.5 * attention + 3 * elements
    blocks = blocks + np.where(full, forward, np.where(selective, elements, 0.0))
    within = _tensor(columns, cluster) + _context(columns, cluster) + _experts(columns, cluster)
    blocks = blocks + (2 + (full | selective)) * within * layers
    blocks = blocks + _gathers(columns, cluster, blocks)
    most, weighed, _ = columns.fullest.T
    pp, virtual, m = grid["pp"], grid["virtual_stages"], _accumulation(columns, cluster)
    slowest = np.where(pp == 1, blocks + 3 * head, blocks * weighed / layers)
    bubble = sum(share * grid.is_value("schedule", name) for name, share in _BUBBLES.items())
    # Before the pipeline is full, it idles whatever the schedule.
    idle = (pp - 1) * slowest * np.where(m < 2 * pp, 1.0, bubble / virtual)
    delay, slope, _ = columns.line(cluster, "pp", "send").T
    send = np.where(pp > 1, delay + slope * columns.stream / grid["tp"], 0.0)
    sends = 2 * (pp * virtual - 1) * send
    # A rank has as many micro-batches under way as there are ranks, and then waits for the way
    # there and back, of which only the borders between unequal pools are long.
    borders = len(cluster.pools) - 1 if len(cluster.pools) > 1 else pp - 1
    slowest = np.maximum(slowest, (blocks + 3 * head + 2 * borders * send) / pp)
    once = _reductions(columns, cluster, most / layers, slowest * _BACKWARD)
    return m * slowest + idle + sends + once + _update(columns, cluster, most / layers)


def _accumulation(columns: Columns, cluster: Cluster) -> Column:
    """Micro-batches a step; of unequal replicas as many as would take devices of average speed as
    long as the slowest replica takes."""
    job, grid = columns.job, columns.grid
    rows = grid.like.rows_by_replica
    if not rows:
        return grid.accumulation
    speed = {id(pool): 1 / model_seconds(job, grid.like, pool) for pool in cluster.pools}
    mean = sum(p.devices * speed[id(p)] for p in cluster.pools) / cluster.devices
    own = cluster.devices // int(grid["pp"][0]) // len(rows)
    slowest = max(many / speed[id(cluster.pool_of(index * own))] for index, many in enumerate(rows))
    return mean * slowest / grid["dp_shard"] / grid["micro_batch"]


def _kernel_seconds(columns: Columns, cluster: Cluster) -> Column:
    """Of a micro-batch through the whole model, forward: products, attention, the rest; the head.

    [candidates, 4]. Unequal devices share the work out so that all are done at once.
    """
    job, grid, kinds = columns.job, columns.grid, columns.kinds
    pools = [(pool.devices / cluster.devices, pool) for pool in cluster.pools]

    def taken(tp: int, cp: int, ep: int, micro: int) -> list[float]:
        plan = columns.plan(tp=tp, cp=cp, ep=ep, dp_shard=ep, micro_batch=micro)
        parts = [(many, layer_operators(job, plan, layer)) for layer, many in kinds]
        rates = np.zeros(4)
        for share, pool in pools:
            kernels = kernels_for(pool, plan)
            sums = np.zeros(4)
            for many, operators in parts:
                sums[:3] += many * np.array(_forward(operators, kernels, columns))
            sums[3] = sum(_forward(head_operators(job, plan), kernels, columns))
            rates += share / np.maximum(sums, 1e-12)
        return (1 / rates).tolist()

    return by(grid, ("tp", "cp", "ep", "micro_batch"), taken)


def _forward(
    operators: Operators, kernels: Kernels, columns: Columns
) -> tuple[float, float, float]:
    precision, stack = columns.grid.like.precision, columns.job.stack
    products = sum(kernels.product(each, precision) for each in operators.products)
    attention = 0.0
    if operators.attention is not None:
        attention = kernels.attention(operators.attention, precision, stack.flash, stack.causal)
    return products, attention, kernels.elements(operators.element_bytes, operators.kernels)


def _tensor(columns: Columns, cluster: Cluster) -> Column:
    """Of a layer's forward pass: a gather and a reduction for each of its halves."""
    delay, slope, _ = columns.line(cluster, "tp", "all_gather").T
    once = 2 * (delay + slope * columns.stream) * (1 - columns.job.stack.overlaps_tensor)
    return np.where(columns.grid["tp"] > 1, columns.cut_halves * once, 0.0)


def _context(columns: Columns, cluster: Cluster) -> Column:
    """Of a layer's forward pass: keys and values, or heads for tokens; a ring hides half of it."""
    grid, config = columns.grid, columns.job.config
    if grid["cp"].max(initial=1) == 1:
        return np.zeros(len(grid))
    queries, keys, values, mixed = attention_widths(config)
    own = columns.tokens * ELEMENT_BYTES[grid.like.precision] / grid["tp"]
    ring = columns.line(cluster, "cp", "send")
    gather = columns.line(cluster, "cp", "all_gather")
    change = columns.line(cluster, "cp", "all_to_all")
    others, width = grid["cp"] - 1, (keys + values) * own
    seconds = 0.5 * others * (ring[:, 0] + ring[:, 1] * width)
    gathered = gather[:, 0] + gather[:, 1] * width * grid["cp"]
    seconds = np.where(grid.is_value("cp_method", "all_gather"), gathered, seconds)
    changed = 2 * change[:, 0] + change[:, 1] * (queries + keys + values + mixed) * own
    seconds = np.where(grid.is_value("cp_method", "ulysses"), changed, seconds)
    return np.where(grid["cp"] > 1, seconds, 0.0)


def _experts(columns: Columns, cluster: Cluster) -> Column:
    """Of a layer's forward pass: tokens to their experts and back."""
    grid, job = columns.grid, columns.job
    spec = job.config.experts
    if spec is None or grid["ep"].max(initial=1) == 1:
        return np.zeros(len(grid))
    sparse = sum(map(job.config.is_sparse, range(job.config.num_layers))) / job.config.num_layers
    delay, slope, _ = columns.line(cluster, "ep", "all_to_all").T
    size = spec.per_token * columns.stream / grid["tp"] * job.imbalance
    once = 2 * sparse * (delay + slope * size) * (1 - job.stack.overlaps_experts)
    return np.where(grid["ep"] > 1, once, 0.0)


def _gathers(columns: Columns, cluster: Cluster, blocks: Column) -> Column:
    """Of a micro-batch: what ZeRO-3 gathers and what ZeRO-2 reduces beyond the computing."""
    grid, stack = columns.grid, columns.job.stack
    if not (grid["zero"] > 1).any():
        return np.zeros(len(grid))
    layers = columns.job.config.num_layers
    whole = columns.weights[:, 0] + columns.weights[:, 1]
    delay, slope, _ = columns.line(cluster, "fsdp", "all_gather").T
    gather = layers * delay + slope * whole * ELEMENT_BYTES[grid.like.precision]
    reduction = layers * delay + slope * whole * stack.gradient_bytes
    there = np.where(grid["zero"] == 3, gather, 0.0)
    back = there + np.where(grid["zero"] >= 2, reduction, 0.0)
    if not stack.overlaps_gathers:
        return there + back
    window, slower = blocks * (1 - _BACKWARD), cluster.pools[0].rates.overlap_slowdown - 1
    exposed = np.maximum(there - window, 0) + slower * np.minimum(there, window)
    window = blocks * _BACKWARD
    return exposed + np.maximum(back - window, 0) + slower * np.minimum(back, window)


def _reductions(columns: Columns, cluster: Cluster, fullest: Column, backward: Column) -> Column:
    """Once a step: gradients over those that share weights, and weights that ZeRO-1 and 2 cut."""
    grid, stack = columns.grid, columns.job.stack
    if columns.job.adapter is not None:
        return np.zeros(len(grid))
    whole = (columns.weights[:, 0] + columns.weights[:, 1]) * fullest + columns.weights[:, 2]
    size, sharded = stack.gradient_bytes * whole, grid["dp_shard"] > 1
    lines = {
        ("replicas", "all_reduce"): np.where(sharded, 0, size),
        ("fsdp", "reduce_scatter"): np.where(grid["zero"] == 1, size, 0),
        ("dp_replicate", "all_reduce"): np.where(sharded, size / columns.shards, 0),
    }
    taken = np.zeros(len(grid))
    for (group, kind), sizes in lines.items():
        delay, slope, _ = columns.line(cluster, group, kind).T  # type: ignore[arg-type]
        taken += np.where(sizes > 0, delay + slope * sizes, 0)
    if stack.overlaps_gradients:
        taken = np.maximum(taken - backward, taken * _EXPOSED)
    delay, slope, _ = columns.line(cluster, "fsdp", "all_gather").T
    gathered = delay + slope * whole * ELEMENT_BYTES[grid.like.precision]
    exposed = stack.exposed_gathers if stack.overlaps_gathers else 1.0
    return taken + exposed * np.where(sharded & (grid["zero"] < 3), gathered, 0)


def _update(columns: Columns, cluster: Cluster, fullest: Column) -> Column:
    """Of the optimizer, on a device's own part of the states."""
    grid, stack = columns.grid, columns.job.stack
    if columns.job.adapter is not None:
        return np.zeros(len(grid))
    blocks, experts, table = columns.weights.T
    own = (blocks * fullest + table) / columns.shards
    own += experts * fullest / np.maximum(1, columns.shards / grid["ep"])
    moved = 2 * (stack.weight_bytes + stack.optimizer_bytes) + stack.gradient_bytes
    slowest = max(
        (kernels_for(p, plan_of(grid.like)) for p in cluster.pools),
        key=lambda k: k.elements(1e9, 1),
    )
    seconds = own * slowest.elements(1e9, 0) / 1e9 * moved
    host = own * (8 / slowest.host_bandwidth + 28 / slowest.host_memory_bandwidth)
    return seconds + np.where(grid.is_value("offload", "none"), 0, host)


def likely_bytes(columns: Columns) -> Column:
    """Bytes of the fullest device, about, [candidates]."""
    job, grid, stack = columns.job, columns.grid, columns.job.stack
    blocks, experts, table = columns.weights.T
    layers, pp, virtual = job.config.num_layers, grid["pp"], grid["virtual_stages"]
    most, _, first = columns.fullest.T
    tables = table * np.where((pp == 1) & (not job.config.tied_embeddings), 2, 1)
    whole = (blocks + experts) * most / layers + tables
    sharded = (blocks * most / layers + tables) / columns.shards
    sharded += experts * most / layers / np.maximum(1, columns.shards / grid["ep"])
    held = np.where(grid.is_value("offload", "none"), stack.optimizer_bytes, 0.0)
    own = stack.weight_bytes + stack.gradient_bytes
    held = held + np.where(grid.is_value("offload", "parameters"), 0.0, own)
    # Micro-batches under way on the first rank, of all its stages together.
    full = np.where(virtual > 1, pp + (pp - 1) / np.maximum(1, virtual), pp)
    in_v = grid.is_value("schedule", "zbv") | grid.is_value("schedule", "dualpipev")
    under_way = np.minimum(grid.accumulation, np.where(in_v, pp, full))
    # Whole weights are copied in the products' type: once where they are shards, else for every
    # micro-batch under way.
    copies = np.where(columns.shards > 1, 1, under_way)
    gathered = np.where(grid["zero"] == 3, 2 * (blocks + experts) / layers + tables, copies * whole)
    states = sharded * held + gathered * ELEMENT_BYTES[grid.like.precision]
    summed = (grid["zero"] == 1) & (grid.accumulation > 1)
    states += np.where(summed, stack.gradient_bytes * whole, 0.0)
    kept = np.maximum(np.where(in_v, most, first) * under_way, most) * columns.layer_bytes
    return states + columns.tokens * (kept + columns.whole_layer_bytes) + _HELD + stack.memory_bytes
