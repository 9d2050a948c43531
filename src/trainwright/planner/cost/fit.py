"""Constants of a cluster from a few measured steps.

Each constant has a likely value and a width, and only moves as far as the measurements insist
(maximum a posteriori, in logarithms); a step that no constant explains counts little (a
pseudo-Huber loss). What is left goes to the residual process of `cost.residual`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from trainwright.planner.cluster.describe import Cluster, Observation, Rates
from trainwright.planner.cost.residual import features
from trainwright.planner.cost.step import step_time
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan

# Relative widths, in logarithms, of what constants may be: four of five lie within 1.3 of them.
WIDTHS: dict[str, float] = {
    "products": 0.15,
    "float8_share": 0.15,
    "float4_share": 0.25,
    "attention": 0.40,
    "memory": 0.30,
    "links": 0.30,
    "networks": 0.60,
    "kernel_seconds": 0.50,
    "score_passes": 0.30,
    "odd_share": 0.50,
    "uneven_share": 0.05,
    "overlap_slowdown": 0.05,
    "pass_seconds": 1.50,
    "step_seconds": 1.00,
}
_NOISE = 0.04  # of a measured step, in logarithms
_ROUNDS = 14
_MOST = {
    "products": 1.0,
    "memory": 1.0,
    "links": 1.0,
    "networks": 1.0,
    "uneven_share": 1.0,
    "odd_share": 1.0,
}


@dataclass(frozen=True)
class Measured:
    """A step that was measured."""

    job: Job
    plan: Plan
    seconds: float


def fit(
    measured: Sequence[Measured],
    cluster_with: Callable[[Measured, Rates], Cluster],
    start: Rates,
) -> tuple[Rates, tuple[Observation, ...]]:
    """The rates that explain `measured` best, and what they leave unexplained of each.

    `cluster_with` gives the machine that a step was measured on, with some rates; `start` has the
    likely values. Constants that nothing measured depends on stay where they are.
    """
    names = list(WIDTHS)

    def rates(moves: np.ndarray) -> Rates:
        moved = {
            name: min(
                _MOST.get(name, math.inf), getattr(start, name) * math.exp(WIDTHS[name] * move)
            )
            for name, move in zip(names, moves, strict=True)
        }
        return replace(start, **moved)

    def errors(there: Rates) -> np.ndarray:
        predicted = [
            step_time(each.job, each.plan, cluster_with(each, there), simulated=False).total
            for each in measured
        ]
        return np.log([p / each.seconds for p, each in zip(predicted, measured, strict=True)])

    def costs(moves: np.ndarray) -> np.ndarray:
        far = errors(rates(moves)) / _NOISE
        robust = np.sign(far) * np.sqrt(2 * (np.sqrt(1 + far**2) - 1))
        return np.concatenate([robust, moves])

    found = least_squares(costs, np.zeros(len(names)), diff_step=0.05, max_nfev=_ROUNDS)
    best = replace(rates(found.x), source=f"fitted to {len(measured)} steps")
    left = errors(best)
    observed = tuple(
        Observation(features(each.job, each.plan), -float(error))
        for each, error in zip(measured, left, strict=True)
    )
    return best, observed


def representative(points: Sequence[tuple[float, ...]], count: int) -> list[int]:
    """Indices of `count` of the points that are least far from all: their medoids.

    Chosen by features alone, whatever was measured there: greedily, then by exchanges as long as
    they help (Kaufman & Rousseeuw 1987).
    """
    places = np.array(points)
    distances = np.abs(places[:, None] - places[None]).sum(axis=-1)
    chosen = [int(distances.sum(axis=1).argmin())]
    while len(chosen) < min(count, len(places)):
        nearest = distances[:, chosen].min(axis=1)
        chosen.append(int(np.minimum(nearest[:, None], distances).sum(axis=0).argmin()))
    improved = True
    while improved:
        improved = False
        for place in range(len(chosen)):
            others = [each for index, each in enumerate(chosen) if index != place]
            nearest = distances[:, others].min(axis=1) if others else np.full(len(places), np.inf)
            sums = np.minimum(nearest[:, None], distances).sum(axis=0)
            best = int(sums.argmin())
            if sums[best] < sums[chosen[place]] - 1e-9:
                chosen[place], improved = best, True
    return chosen
