"""Seconds of kernels and collectives as they were measured on this machine, and between the points.

Rates of products and attention are a mean of the measured ones, weighted by how near their shapes
are; times of what has one size are interpolated, both on logarithmic scales. What nobody has
measured is told by the data sheet, as elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from scipy.optimize import isotonic_regression

from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.cluster.calibration import PACKED_VISIBLE, Crowd
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Pool, Rates
from trainwright.planner.cost.calls import Call
from trainwright.planner.cost.kernels import Kernels, kernels_of
from trainwright.planner.cost.operators import Attention, Product, layer_operators
from trainwright.planner.cost.stage import passes
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan, Precision
from trainwright.planner.shapes import block_parameters

Shape = tuple[int, ...]
Points = tuple[tuple[float, float], ...]  # sizes and seconds
_NEARNESS = 4  # the power of distance that weights fall with: the nearest samples decide
# Tensor parallelism has its own gathers; FSDP2 calls the backend's. See `comm.collectives`.
_BY_MESSAGES = {"all_gather": "gather", "reduce_scatter": "scatter_sum"}


@dataclass(frozen=True)
class MeasuredKernels(Kernels):
    """A device's kernels where `crowd` was measured, its times multiplied by `scale`."""

    crowd: Crowd = field(kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    slotted: bool = field(default=False, kw_only=True)  # attention's rows lie on several workers

    def product(self, product: Product, precision: str) -> float:
        """A matrix product, all `times` of it one after the other."""
        table = _tables(self.crowd).get(("product", precision))
        if table is None:
            return super().product(product, precision)
        shape = (product.rows, product.columns, product.inner)
        return self.scale * product.times * table.seconds(shape, (1, 1, 1))

    def attention(self, attention: Attention, precision: str, flash: bool, causal: bool) -> float:
        """The forward pass of attention's core."""
        return self._attention("attention", attention, precision) or super().attention(
            attention, precision, flash, causal
        )

    def attention_backward(
        self, attention: Attention, precision: str, flash: bool, causal: bool
    ) -> float:
        """Its backward pass."""
        return self._attention("attention_backward", attention, precision) or (
            super().attention_backward(attention, precision, flash, causal)
        )

    def elements(self, moved: float, kernels: int) -> float:
        """Kernels that read and write `moved` bytes, all of them together."""
        table = _tables(self.crowd).get(("elements", ""))
        if table is None or not kernels:
            return super().elements(moved, kernels)
        return self.scale * kernels * interpolate(table.by_size, moved / kernels)

    def collective(self, call: Call, workers: int) -> float | None:
        """All times of a collective in a group of `workers`; None where none was measured."""
        kind: str = call.kind
        if call.dimension in ("tp", "cp"):
            kind = _BY_MESSAGES.get(kind, kind)
        table = _tables(self.crowd).get((kind, ""))
        if table is None or workers == 1:
            return None
        group = min(table.by_group, key=lambda size: abs(math.log2(size / workers)))
        # A ring moves (n - 1)/n of the bytes past each worker.
        share = 1.0 if kind == "send" else (1 - 1 / workers) / (1 - 1 / group)
        each = interpolate(table.by_group[group], call.size)
        return self.scale * call.times * share * each

    def _attention(self, kernel: str, attention: Attention, precision: str) -> float | None:
        """Of the queries that are here, and between whole rows and packed ones."""
        shape = (attention.heads, attention.all_keys, attention.width)
        whole = self._square(kernel, precision, shape)
        if whole is None:
            return None
        hidden = 1 - 2 * attention.keys / attention.all_keys  # share of the causal square
        packed = self._square(f"packed_{kernel}", precision, shape)
        if packed is None:
            taken = whole * (1 - hidden)
        else:
            taken = whole + (min(packed, whole) - whole) * hidden / (1 - PACKED_VISIBLE)
        # What each block of queries costs stays, however little it sees.
        taken = self.scale * max(taken, whole / 10) * attention.queries / attention.all_keys
        half = self._square(f"slotted_{kernel}", precision, shape) if self.slotted else None
        return taken if half is None else taken * 2 * half / whole

    def _square(self, kernel: str, precision: str, shape: Sequence[float]) -> float | None:
        table = _tables(self.crowd).get((kernel, precision))
        return None if table is None else table.seconds(shape, (1, 2, 1))


class Table:
    """Seconds of one kernel at the shapes that were measured."""

    def __init__(self, points: Mapping[Shape, float]) -> None:
        self.points = points
        self._places = np.log([list(map(float, shape)) for shape in points])
        self._seconds = np.log(list(points.values()))

    def seconds(self, shape: Sequence[float], powers: Sequence[int]) -> float:
        """At `shape`, whose work is the product of its sizes, each to one of `powers`.

        The logarithm of the rate is the mean of the measured ones', weighted by how near their
        shapes are on a logarithmic scale (Shepard 1968): exact where it was measured, and nowhere
        above the fastest or below the slowest.
        """
        exact = self.points.get(tuple(shape))  # type: ignore[arg-type]
        if exact is not None:
            return exact
        place, power = np.log(np.maximum(shape, 1e-9)), np.array(powers)
        rates = self._places @ power - self._seconds
        distances = ((self._places - place) ** 2).sum(axis=1)
        weights = (distances + 1e-12) ** (-_NEARNESS / 2)
        return float(np.exp(place @ power - weights @ rates / weights.sum()))

    @cached_property
    def by_size(self) -> Points:
        """Of a kernel that has one size: that and the seconds, in order."""
        return tuple(sorted((float(shape[0]), each) for shape, each in self.points.items()))

    @cached_property
    def by_group(self) -> Mapping[int, Points]:
        """Of a collective: bytes and seconds by the number of workers in a group, mended."""
        groups: dict[int, dict[int, float]] = {}
        for (workers, size), seconds in self.points.items():  # type: ignore[misc]
            groups.setdefault(workers, {})[size] = seconds
        return {workers: monotone(points) for workers, points in groups.items()}


@lru_cache(maxsize=16)
def _tables(crowd: Crowd) -> Mapping[tuple[str, str], Table]:
    found: dict[tuple[str, str], dict[Shape, float]] = {}
    for sample in crowd.samples:
        found.setdefault((sample.kernel, sample.precision), {})[sample.shape] = sample.seconds
    return {kind: Table(points) for kind, points in found.items()}


def kernels_for(pool: Pool, plan: Plan) -> Kernels:
    """The kernels of a pool's devices under a plan: as measured with as many workers, if ever.

    With another number of workers than was measured, a worker has another share of the cores.
    """
    calibration = pool.calibration
    crowd = None if calibration is None else calibration.crowd(plan.world_size)
    if calibration is None or crowd is None:
        return kernels_of(pool)
    share, scale = 1.0, calibration.scale(crowd, plan.world_size, plan.threads)
    if pool.device.kind == "cpu":
        cores = int(calibration.facts["cores"])
        share = min(1.0, cores / (plan.world_size * plan.threads))
    # A collective beside them slows kernels by as much of its time as it does not hide.
    rates = replace(pool.rates, overlap_slowdown=2 - crowd.hidden_share)
    slotted = plan.cp > 1 and plan.cp_method != "ulysses"
    kernels = MeasuredKernels(
        pool.device, rates, share=share, crowd=crowd, scale=scale, slotted=slotted
    )
    if plan.compile:
        return kernels
    return replace(kernels, small_kernels=_small_kernels(crowd, pool.device, pool.rates))


@lru_cache(maxsize=64)
def _small_kernels(crowd: Crowd, device: DeviceKind, rates: Rates) -> float:
    """What of measured layers is neither products nor attention, over what its bytes would take.

    Kernels that nothing fuses write and read temporaries, in wider types, that no count knows. 1
    where no layer was measured.
    """
    kernels, ratios = MeasuredKernels(device, rates, crowd=crowd), []
    for precision in ("bf16", "fp32"):
        there = _tables(crowd).get(("layer", precision))
        back = _tables(crowd).get(("layer_backward", precision))
        if there is None or back is None:
            continue
        for shape, seconds in there.points.items():
            if shape in back.points:
                known, small = _layer_seconds(shape, precision, kernels)
                ratios.append(max(1.0, (seconds + back.points[shape] - known) / small))
    return statistics.geometric_mean(ratios) if ratios else 1.0


def _layer_seconds(shape: Shape, precision: Precision, kernels: Kernels) -> tuple[float, float]:
    """Of a layer there and back: products, attention and copies of weights; and small kernels."""
    rows, tokens, *_ = shape
    config = layer_config(shape)
    plan = replace(Plan.alone(), precision=precision, micro_batch=rows, sequence_length=tokens)
    job = Job(config, tokens, rows)
    works = passes(job, plan, layer_operators(job, plan, 0), kernels)
    known = sum(work.products + work.attention for work in works)
    if precision != "fp32":  # weights narrowed, gradients widened
        known += kernels.elements(12.0 * block_parameters(config, 0).total, 24)
    return known, sum(work.elements for work in works)


def layer_config(shape: Shape) -> DecoderConfig:
    """A model of one layer of a measured `layer`'s shape."""
    _, _, hidden, inner, heads, kv_heads = shape
    values = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return decoder_config(new_hf_config("llama", values, 64))


def measured_links(cluster: Cluster, plan: Plan) -> MeasuredKernels | None:
    """The collectives of a machine that has been measured; None where several take part."""
    if len(cluster.pools) > 1 or cluster.pools[0].nodes > 1:
        return None
    kernels = kernels_for(cluster.pools[0], plan)
    return kernels if isinstance(kernels, MeasuredKernels) else None


def interpolate(points: Points, size: float) -> float:
    """Seconds at `size` between (size, seconds) in the order of sizes, all of them logarithmic.

    Below the smallest size it is that one's time, above the largest its rate.
    """
    if size <= points[0][0]:
        return points[0][1]
    if size >= points[-1][0]:
        return points[-1][1] * size / points[-1][0]
    (left, below), (right, above) = next(
        pair for pair in pairwise(points) if pair[0][0] <= size < pair[1][0]
    )
    way = math.log(size / left) / math.log(right / left)
    return below * (above / below) ** way


def monotone(points: Mapping[int, float]) -> Points:
    """Times of messages by size, mended so that larger ones never take less, nor less bandwidth.

    The nearest such to what was measured, in squares of logarithms: noise would otherwise make a
    plan look better for sending more (Alpa, arXiv:2201.12023, does likewise).
    """
    sizes = sorted(points)
    each = np.log([points[size] / size for size in sizes])
    falling = np.exp(isotonic_regression(each, increasing=False).x)
    seconds = np.maximum.accumulate(falling * np.array(sizes, float))
    return tuple(zip(map(float, sizes), map(float, seconds), strict=True))
