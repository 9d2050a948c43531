"""Which layers each stage of a pipeline gets, where layers or devices are not equal.

After Alpa's dynamic program over stages (Zheng et al. 2022, arXiv:2201.12023): a pipeline takes the
sum of its stages and, for every further micro-batch, its slowest stage once more.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_SAME = 1e-9  # relative; times that differ by less are one


@dataclass(frozen=True)
class Stages:
    """Seconds and bytes of every layer on every stage, each with its own device.

    `seconds` and `memory` are [stages, layers]: of a micro-batch there and back, and of weights,
    states and activations under way; the embedding's are the first layer's, and the head's the
    last one's. `limits` [stages] are the devices' bytes.
    """

    seconds: Array
    memory: Array
    limits: Array

    @cached_property
    def taken(self) -> Array:
        """Seconds [stages, first, end] of the layers from first to before end on a stage.

        Infinite where there are none, or where they do not fit.
        """
        layers = self.seconds.shape[1]
        seconds = _between(self.seconds)
        seconds[_between(self.memory) > self.limits[:, None, None]] = math.inf
        seconds[:, np.tri(layers + 1, dtype=bool)] = math.inf
        return seconds

    def pipeline_seconds(self, layers: Sequence[int], micro_batches: int) -> float:
        """What is minimised, of so many layers a stage; infinite where they do not fit."""
        ends = np.cumsum(layers)
        times = self.taken[np.arange(len(layers)), ends - layers, ends]
        return float(times.sum() + (micro_batches - 1) * times.max())


def split_stages(stages: Stages, micro_batches: int) -> tuple[int, ...] | None:
    """Layers of each stage, one at least, with the least `pipeline_seconds`; None if none fit.

    For each time that the slowest stage may take, from the shortest on, the least sum of stages of
    which none takes longer; until further micro-batches alone would take more than the best found.
    """
    taken = stages.taken
    least, _ = _least_sum(taken)
    if math.isinf(least):
        return None
    times = _distinct(taken)
    possible = bisect.bisect_left(
        times, True, key=lambda limit: math.isfinite(_least_sum(_within(taken, limit))[0])
    )
    best, split = math.inf, None
    for limit in times[possible:]:
        if least + (micro_batches - 1) * limit >= best:
            break
        total, layers = _least_sum(_within(taken, limit))
        if total + (micro_batches - 1) * limit < best:
            best, split = total + (micro_batches - 1) * limit, layers
    return split


def _between(values: Array) -> Array:
    """Sums [stages, first, end] of values [stages, layers]."""
    sums = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)
    return sums[:, None, :] - sums[:, :, None]


def _within(taken: Array, limit: float) -> Array:
    return np.where(taken <= limit * (1 + _SAME), taken, math.inf)


def _distinct(taken: Array) -> list[float]:
    """The times that there are, ascending."""
    times = np.unique(taken[np.isfinite(taken)])
    new = np.diff(times, prepend=-math.inf) > _SAME * times
    return [float(time) for time in times[new]]


def _least_sum(taken: Array) -> tuple[float, tuple[int, ...]]:
    """The least sum of stages that have all layers between them, and the layers of each."""
    sums = np.full(taken.shape[1], math.inf)  # of the stages so far, by the layers that they have
    sums[0] = 0.0
    firsts = []
    for stage in taken:
        totals = sums[:, None] + stage  # [first, end]
        firsts.append(totals.argmin(axis=0))
        sums = totals.min(axis=0)
    end, layers = len(sums) - 1, list[int]()
    for first in reversed(firsts):
        layers.append(end - int(first[end]))
        end = int(first[end])
    return float(sums[-1]), tuple(reversed(layers))
