"""Seconds of a kernel on a device, from its shape.

A matrix product is cut into tiles that the device's units take in waves: the last wave is as long
as a full one however few tiles it has, so a size just above a multiple wastes most of a wave (found
in BigScience's chronicles: hidden 14,400 reached 94 TFLOP/s where 13,824 reached 120). Short inner
dimensions do not fill the pipeline of a tile; odd ones are loaded in small pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

from trainwright.planner.cluster.describe import DeviceKind, Pool, Rates
from trainwright.planner.cost.operators import Attention, Product

# Tiles that libraries choose from, as shares of the device's largest, and what each reaches of it:
# smaller tiles read their inputs more often. Shares after NVIDIA's guide to matrix products.
_TILES = ((1.0, 1.0, 1.0), (0.5, 1.0, 0.96), (1.0, 0.5, 0.96), (0.5, 0.5, 0.87), (0.5, 0.25, 0.72))
_FLASH_BACKWARD = 2.5  # of its forward pass, after Dao 2022
_FILL = 96.0  # inner elements that a tile's start and end cost
_NARROW = ("float8", "float4")
_WIDENING = ("float4", "float8", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Kernels:
    """A device's kernels in seconds, by its data sheet and the rates that it reaches."""

    device: DeviceKind
    rates: Rates
    # Bytes/s between the device and its host's memory, and that its share of the host works at.
    host_bandwidth: float = field(default=25e9, kw_only=True)
    host_memory_bandwidth: float = field(default=50e9, kw_only=True)
    # Of a core, where threads of several workers take turns on it.
    share: float = field(default=1.0, kw_only=True)
    # Of a layer's kernels that compute next to nothing, over what their bytes take.
    small_kernels: float = field(default=1.0, kw_only=True)

    def product(self, product: Product, precision: str) -> float:
        """A matrix product, all `times` of it in one kernel."""
        kind = precision if product.narrow or precision not in _NARROW else "bf16"
        return _product_seconds(*product[:4], kind, self.device, self.rates)

    def attention(self, attention: Attention, precision: str, flash: bool, causal: bool) -> float:
        """The forward pass of attention's core."""
        kind = "bf16" if precision in _NARROW else precision
        if flash:
            flops = (
                attention.flops
                if causal
                else attention.flops * (attention.all_keys / attention.keys)
            )
            narrow = min(1.0, attention.width / 128) ** 0.35
            rate = peak(self.device, kind) * self.rates.attention * narrow
            return flops / rate + self.rates.kernel_seconds
        rows, keys = attention.queries, attention.all_keys
        products = (
            Product(rows, keys, attention.width, attention.heads),
            Product(rows, attention.value_width, keys, attention.heads),
        )
        seconds = sum(
            _product_seconds(*each[:4], kind, self.device, self.rates) for each in products
        )
        # Scores are written, read and written by the softmax, by dropout once more, and read.
        moved = attention.heads * rows * keys * 2 * self.rates.score_passes
        return seconds + self.elements(moved, 4)

    def attention_backward(
        self, attention: Attention, precision: str, flash: bool, causal: bool
    ) -> float:
        """Its backward pass: five products where there were two, and of stored scores four."""
        forward = self.attention(attention, precision, flash, causal)
        return forward * (_FLASH_BACKWARD if flash else 2.0)

    def elements(self, moved: float, kernels: int) -> float:
        """Kernels that read and write `moved` bytes."""
        bandwidth = self.device.memory_bandwidth * self.rates.memory
        return moved / bandwidth + kernels * self.rates.kernel_seconds


def kernels_of(pool: Pool) -> Kernels:
    """The kernels of a pool's devices."""
    if pool.host_link is None:
        return Kernels(pool.device, pool.rates)
    return Kernels(pool.device, pool.rates, host_bandwidth=pool.host_link.bandwidth)


def peak(device: DeviceKind, precision: str) -> float:
    """FLOP/s of the data sheet in a type, or in the next wider one that the device has."""
    if precision in device.peak_flops:
        return device.peak_flops[precision]
    for kind in _WIDENING[_WIDENING.index(precision) :] if precision in _WIDENING else ():
        if kind in device.peak_flops:
            return device.peak_flops[kind]
    return max(device.peak_flops.values())


@lru_cache(maxsize=1 << 18)
def _product_seconds(
    rows: float,
    columns: float,
    inner: float,
    times: float,
    precision: str,
    device: DeviceKind,
    rates: Rates,
) -> float:
    flops = 2.0 * rows * columns * inner * times
    share = rates.products * quantisation(rows, columns, times, device)
    share *= (inner / (inner + _FILL)) * aligned(rates, inner, columns)
    share *= {"float8": rates.float8_share, "float4": rates.float4_share}.get(precision, 1.0)
    element = {"float4": 0.5, "float8": 1.0, "fp32": 4.0}.get(precision, 2.0)
    moved = times * (
        element * (rows * inner + columns * inner) + max(2.0, element) * rows * columns
    )
    bandwidth = device.memory_bandwidth * rates.memory
    seconds = max(flops / (peak(device, precision) * share), moved / bandwidth)
    if precision in _NARROW:  # its inputs are read wide, their largest found, and written narrow
        seconds += times * (5 + element) * rows * inner / bandwidth
    return seconds + rates.kernel_seconds


@lru_cache(maxsize=1 << 16)
def quantisation(rows: float, columns: float, times: float, device: DeviceKind) -> float:
    """Share of the device's units that do useful work, with the best of its tiles."""
    tall, wide = max(device.tile), min(device.tile)
    best = 0.0
    for down, across in ((tall, wide), (wide, tall)):
        for height, width, reached in _TILES:
            high, broad = max(16.0, down * height), max(16.0, across * width)
            tiles = times * math.ceil(rows / high) * math.ceil(columns / broad)
            waves = math.ceil(tiles / device.units)
            work = times * rows * columns / (high * broad)
            best = max(best, reached * work / (waves * device.units))
    return best


def aligned(rates: Rates, *sizes: float) -> float:
    """What odd sizes leave: tensor cores load 16 bytes at a time, and caches 128 in a line."""
    share = 1.0
    for size in sizes:
        if size % 8:
            share *= rates.odd_share
        elif size % 64:
            share *= rates.uneven_share
    return share
