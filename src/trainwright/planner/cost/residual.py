"""What measured steps say of the next prediction, beyond what any constant can.

The logarithm of measured over predicted seconds is taken for a Gaussian process over a plan's
features: near what was measured a prediction leans towards it, far away it stays as it is, and the
interval says which (Rasmussen & Williams 2006, chapter 2; an exponential kernel of the distances'
sum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainwright.planner.cluster.describe import Observation
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan

_AMPLITUDE = 0.08  # at least, of what constants leave unexplained, in logarithms
_NOISE = 0.04  # of a measured step
_LENGTH = 3.0  # of distances between features at which little is said any more
_TREND, _SPARSE_TREND = 0.1, 0.3  # by which software may have become quicker in a year
_SPARSE, _VERSION = 12, 17  # places of these among the features
_Z = 1.2816  # four of five are within so many standard deviations


def features(job: Job, plan: Plan) -> tuple[float, ...]:
    """What makes plans alike: each entry is scaled so that 1 is a noticeable difference."""
    config = job.config
    odd, uneven = config.head_dim % 8 != 0, config.head_dim % 64 != 0
    tokens = plan.micro_batch * job.sequence_length / plan.cp
    return (
        math.log2(tokens),
        math.log2(plan.tp),
        math.log2(plan.pp),
        math.sqrt(plan.virtual_stages),
        math.log2(plan.cp),
        0.5 * math.log2(plan.ep),
        0.5 * math.log2(plan.world_size),
        math.log2(max(1.0, plan.accumulation / plan.pp)),
        1.5 * math.log2(config.hidden_size),
        3.0 * odd,
        1.0 * uneven,
        0.7 * math.log2(job.sequence_length),
        2.0 * (config.experts is not None),
        1.5 * (plan.recompute == "full"),
        1.5 * (plan.recompute == "selective"),
        1.5 * plan.zero**0.5,
        2.0 * {"float8": 1, "float4": 2}.get(plan.precision, 0),
        job.stack.version,
    )


_SCALES = np.array([1.0] * 17 + [3.0])  # a third of a year of software is noticeable


@dataclass(frozen=True)
class Correction:
    """What to multiply predicted seconds by, and the relative half width that is left."""

    factor: float
    spread: float


def correction(observed: Sequence[Observation], job: Job, plan: Plan, spread: float) -> Correction:
    """What `observed` steps say of another plan; `spread` is the interval's half width so far."""
    if not observed:
        return Correction(1.0, spread)
    points, weights, inverse, amplitude = _process(tuple(observed))
    here = np.array([features(job, plan)])
    near = _covariance(here, points, amplitude)[0]
    own = float(_covariance(here, here, amplitude)[0, 0])
    variance = max(0.0, own - float(near @ inverse @ near)) + _NOISE**2
    return Correction(math.exp(float(near @ weights)), math.exp(_Z * math.sqrt(variance)) - 1)


@lru_cache(maxsize=64)
def _process(
    observed: tuple[Observation, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Where was measured, what each measurement weighs, their inverse covariance, the amplitude.

    The amplitude is what was left unexplained there, on average.
    """
    points = np.array([each.features for each in observed])
    left = np.array([each.log_ratio for each in observed])
    amplitude = max(_AMPLITUDE, float(np.sqrt(np.mean(left**2))))
    covariance = _covariance(points, points, amplitude) + _NOISE**2 * np.eye(len(points))
    inverse = np.linalg.inv(covariance)
    return points, inverse @ left, inverse, amplitude


def _covariance(first: np.ndarray, second: np.ndarray, amplitude: float) -> np.ndarray:
    """Of the logarithms at two sets of features: [first, second]."""
    distances = (_SCALES * np.abs(first[:, None] - second[None])).sum(axis=-1)
    near = amplitude**2 * np.exp(-distances / _LENGTH)
    # Software gets quicker from release to release, and with experts faster than without.
    dense = first[:, None, _VERSION] * second[None, :, _VERSION]
    sparse = dense * (first[:, None, _SPARSE] > 0) * (second[None, :, _SPARSE] > 0)
    return near + _TREND**2 * dense + _SPARSE_TREND**2 * sparse
