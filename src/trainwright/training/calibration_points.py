"""What is measured of a machine: a grid of shapes, and those that a recipe's plans will have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from trainwright.planner.cluster.calibration import KERNELS
from trainwright.planner.cost.measured import layer_config
from trainwright.planner.cost.operators import Product, head_operators, layer_operators
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan, Precision
from trainwright.training.stopwatch import Point

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
_ROWS, _SIDES = (64, 512, 4096), (128, 512, 2048)
_HEADS, _TOKENS, _WIDTHS = (2, 16), (256, 1024), (64, 128)
_BYTES = (48, 1 << 12, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26)  # of elements
# The extremes first: where time runs out, what lies between is told from them.
_MESSAGES = (1 << 25, 1 << 10, 1 << 21, 1 << 16, 1 << 23, 1 << 19)
_LAYER = (4, 512, 512, 1408, 8, 8)
_ATTENTIONS = tuple(name for name in KERNELS if "attention" in name)
COLLECTIVES = tuple(name for name, axes in KERNELS.items() if axes == ("workers", "bytes"))
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_MOST_TOKENS = 8192  # of a micro-batch


def basics(workers: int, precision: Precision) -> Iterator[Point]:
    """What every plan needs, measured with `workers` at once."""
    for size in _BYTES:
        yield Point("elements", "", (size,))
    for size, kernel, group in itertools.product(_MESSAGES, COLLECTIVES, groups(workers)):
        yield Point(kernel, "", (group, size))
    yield from _layer(precision, _LAYER)


def grid() -> Iterator[Point]:
    """Layers, attention and products of many shapes, for every recipe."""
    for precision in PRECISIONS:
        yield from _layer(precision, _LAYER)
    for precision in PRECISIONS:
        for kernel, *shape in itertools.product(_ATTENTIONS, _HEADS, _TOKENS, _WIDTHS):
            yield Point(kernel, precision, tuple(shape))
        for sides in itertools.product(_ROWS, _SIDES, _SIDES):
            yield Point("product", precision, sides)


def _layer(precision: Precision, shape: tuple[int, ...]) -> Iterator[Point]:
    """A layer, and what of it is known by other names, so that the rest is told exactly."""
    plan = replace(
        Plan.alone(), precision=precision, micro_batch=shape[0], sequence_length=shape[1]
    )
    yield from _of_plan(Job(layer_config(shape), shape[1], shape[0]), plan)
    yield Point("layer", precision, shape)
    yield Point("layer_backward", precision, shape)


def groups(workers: int) -> list[int]:
    """Sizes of groups among so many workers: 2, 4, … up to all of them."""
    sizes = {2**power for power in range(1, workers.bit_length()) if workers % 2**power == 0}
    return sorted({*sizes, workers} - {1})


def of_job(job: Job, precision: Precision, workers: int) -> Iterator[Point]:
    """Products and attention as they are in plans of the job for so many workers, each once."""
    seen = set()
    for micro_batch, tp, cp in itertools.product(_MICRO_BATCHES, *[(1, *groups(workers))] * 2):
        if workers % (tp * cp) or not _cuts(job, tp, cp):
            continue
        if micro_batch > job.batch_sequences or micro_batch * job.sequence_length > _MOST_TOKENS:
            continue
        plan = Plan(
            world_size=workers,
            dp_replicate=workers // (tp * cp),
            dp_shard=1,
            micro_batch=micro_batch,
            accumulation=1,
            threads=1,
            precision=precision,
            recompute="none",
            compile=False,
            device="cpu",
            sequence_length=job.sequence_length,
            optimizer=job.optimizer,
            tp=tp,
            cp=cp,
        )
        for point in _of_plan(job, plan):
            if point not in seen:
                seen.add(point)
                yield point


def _of_plan(job: Job, plan: Plan) -> Iterator[Point]:
    layers = {layer_operators(job, plan, layer) for layer in range(job.config.num_layers)}
    for operators in (*layers, head_operators(job, plan)):
        for product in operators.products:
            for each in _passes(product):
                yield Point("product", plan.precision, tuple(map(round, each[:3])))
        attention = operators.attention
        if attention is not None and plan.cp == 1:
            shape = (round(attention.heads), round(attention.all_keys), attention.width)
            for kernel in _ATTENTIONS:
                yield Point(kernel, plan.precision, shape)


def _passes(product: Product) -> Iterator[Product]:
    """Forward, and backward to the inputs and the weights."""
    rows, columns, inner = product[:3]
    yield product
    yield product._replace(columns=inner, inner=columns)
    yield product._replace(rows=inner, inner=rows)


def _cuts(job: Job, tp: int, cp: int) -> bool:
    config = job.config
    sizes = (config.num_heads, config.intermediate_size, config.vocab_size)
    return all(size % tp == 0 for size in sizes) and job.sequence_length % (2 * cp * tp) == 0
