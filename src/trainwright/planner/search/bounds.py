"""The least time that candidates can take and the least memory that they can hold, all at once.

Every term is a part of what the cost model counts, at the best rate that it knows: what is more
than the limit, or slower than a plan already found, need not be looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainwright.planner.cluster.describe import Cluster, Rates
from trainwright.planner.cost.kernels import peak
from trainwright.planner.memory import ELEMENT_BYTES
from trainwright.planner.schedules import SCHEDULES
from trainwright.planner.search.columns import Columns
from trainwright.planner.search.grid import Column
from trainwright.planner.shapes import flops_per_token, head_outputs
from trainwright.planner.stacks import TRAINWRIGHT


def least_seconds(columns: Columns, cluster: Cluster) -> Column:
    """Seconds of a step, at least, [candidates].

    Products at the best rate, through a pipeline that idles as little as its schedule can; what
    tensor parallelism sends besides, for it waits for that; or the gradients, where sending them
    takes longer. 0 on CPUs, whose rates are measured by shape.
    """
    job, grid = columns.job, columns.grid
    if any(pool.device.kind == "cpu" for pool in cluster.pools):
        return np.zeros(len(grid))
    pp, m = grid["pp"], grid.accumulation
    # Of a micro-batch on a worker's part of the model, on average over the stages.
    each = grid["micro_batch"] * job.sequence_length * _token_seconds(columns, cluster)
    each /= pp * grid["cp"] * grid["tp"]
    if len(cluster.pools) == 1:
        each += _tensor_seconds(columns, cluster) / pp
    # Whatever the stages, the first micro-batch goes through all of them, and the slowest has m.
    # With one stage a rank and whole backward passes all but the slowest idle meanwhile; a stage's
    # time is granted, for stages that are not even may win a part of it.
    waits = np.where(grid.is_value("schedule", "1f1b"), np.maximum(0, pp - 2), 0)
    # Split, the weights' halves of the first micro-batch need not wait for one another.
    through = np.where(_splits(columns), 1, pp)
    if grid.like.rows_by_replica or len(cluster.pools) > 1:
        m, waits = _mean_accumulation(columns), 0 * waits
    pipeline = np.maximum(m + waits, through) * each
    if len(cluster.pools) > 1:
        return pipeline
    return np.maximum(pipeline, _gradient_seconds(columns, cluster))


def _splits(columns: Columns) -> Column:
    names = [name for name, kind in SCHEDULES.items() if kind.splits]
    return np.logical_or.reduce([columns.grid.is_value("schedule", name) for name in names])


def _mean_accumulation(columns: Columns) -> Column:
    grid = columns.grid
    assert grid.like.rows is not None
    return grid.like.rows / grid.data_ranks / grid["micro_batch"]


def _token_seconds(columns: Columns, cluster: Cluster) -> Column:
    """Of a token through the whole model, there and back, on one device of average speed."""
    job, grid = columns.job, columns.grid
    config, length = job.config, job.sequence_length
    head = 2.0 * config.hidden_size * head_outputs(config)
    products = flops_per_token(config, 1) - head
    attention = (flops_per_token(config, length) - flops_per_token(config, 1)) * job.visible_share
    again = grid.is_value("recompute", "full")
    passes = 2 if job.adapter is not None else 3
    work: dict[tuple[str, str], Any] = {
        (grid.like.precision, "products"): products * (passes + again),
        ("bf16" if grid.like.precision == "float8" else grid.like.precision, "head"): head * passes,
        ("bf16" if grid.like.precision == "float8" else grid.like.precision, "attention"): (
            attention * (3 + again)
        ),
    }
    total = np.zeros(len(grid))
    for (precision, kind), flops in work.items():
        # Work that could be divided at will would be done by all devices' rates together.
        rate = sum(
            pool.devices
            * peak(pool.device, precision)
            * _best_rate(pool.rates, kind, flash=job.stack.flash)
            for pool in cluster.pools
        )
        total += flops * cluster.devices / rate
    return total


def _best_rate(rates: Rates, kind: str, *, flash: bool) -> float:
    """Share of the peak; scores that no kernel fuses are made by plain products."""
    if kind != "attention":
        return rates.products
    return rates.attention if flash else max(rates.attention, rates.products)


def _tensor_seconds(columns: Columns, cluster: Cluster) -> Column:
    """Of a micro-batch: a gather and a reduction for each half of a block, there and back."""
    job, grid = columns.job, columns.grid
    times = 2 * columns.cut_halves * job.config.num_layers * (1 - job.stack.overlaps_tensor)
    slope = columns.line(cluster, "tp", "all_gather")[:, 2]
    slope = slope + columns.line(cluster, "tp", "reduce_scatter")[:, 2]
    return np.where(grid["tp"] > 1, times * columns.stream * slope, 0.0)


def _gradient_seconds(columns: Columns, cluster: Cluster) -> Column:
    """Of the gradients, whose average stage is reduced over the workers that share weights."""
    job, grid = columns.job, columns.grid
    if job.adapter is not None or job.stack.overlaps_gradients:
        # The cost model hides all but an eighth of it or so in the backward pass.
        return np.zeros(len(grid))
    blocks = columns.weights[:, 0] / grid["pp"] * job.stack.gradient_bytes
    slope = columns.line(cluster, "replicas", "all_reduce")[:, 2]
    return np.where(grid["dp_shard"] == 1, blocks * slope, 0.0)


def least_bytes(columns: Columns) -> Column:
    """Bytes of the fullest device, at least, [candidates]: states and kept activations.

    Layers may be shared out over the stages in any way: where rank i keeps s + k_i a of each layer,
    k_i of its micro-batches being under way, the fullest of all has L / sum(1 / (s + k_i a)) at
    least, which it has where all are equally full.
    """
    job, grid = columns.job, columns.grid
    layers = job.config.num_layers
    states = _state_bytes(columns) / layers
    kept = columns.layer_bytes * columns.tokens
    if job.adapter is not None or job.stack != TRAINWRIGHT or len(columns.kinds) > 1:
        # Others keep other activations; and unequal layers may be shared out better than evenly.
        kept = 0.0 * kept
    pp, m = grid["pp"], grid.accumulation
    in_line = grid.is_value("schedule", "1f1b") | grid.is_value("schedule", "gpipe")
    shares = np.zeros(len(grid))
    for rank in range(int(pp.max(initial=1))):
        under_way = np.where(in_line, np.minimum(m, pp - rank), 1)
        shares += np.where(rank < pp, 1 / np.maximum(states + under_way * kept, 1e-9), 0.0)
    return layers / shares


def _state_bytes(columns: Columns) -> Column:
    """Of all blocks on the workers that share them, where one held them all."""
    job, grid, stack = columns.job, columns.grid, columns.job.stack
    blocks, experts, _ = columns.weights.T
    sharded, zero = columns.shards > 1, grid["zero"]
    element = ELEMENT_BYTES[grid.like.precision]
    on_device = grid.is_value("offload", "none")
    if job.adapter is not None:
        packed = {"none": element, "int8": 1.0, "nf4": 0.5}[job.adapter.quantise]
        return packed * (blocks / columns.shards + experts / columns.shards * grid["ep"])
    total = np.zeros(len(grid))
    for elements, shards in ((blocks, columns.shards), (experts, columns.shards / grid["ep"])):
        shards = np.maximum(shards, 1)
        optimizer = np.where(on_device, stack.optimizer_bytes, 0.0) / shards
        own = (stack.weight_bytes + stack.gradient_bytes) / shards
        own = np.where(grid.is_value("offload", "parameters"), 0.0, own)
        # ZeRO-1 and 2 have whole weights to compute with, in one type or another.
        whole = np.where(sharded & (zero < 3), min(element, stack.weight_bytes), 0.0)
        total += elements * np.maximum(own + optimizer, whole + optimizer)
    return total
