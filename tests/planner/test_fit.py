"""Constants from measured steps, and what is left to say of the next."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.planner.test_step_cost import WIDE, cluster_of, job_of, plan_of
from trainwright.planner.cluster.describe import Observation, Rates
from trainwright.planner.cost.fit import Measured, fit, representative
from trainwright.planner.cost.residual import correction, features
from trainwright.planner.cost.step import predict, step_time

PLANS = [
    plan_of(WIDE, world=16, tp=tp, pp=pp, micro_batch=rows, sequence_length=4096)
    for tp, pp, rows in [(1, 1, 1), (1, 1, 16), (8, 1, 4), (2, 4, 8), (8, 2, 2), (4, 1, 32)]
]


def test_constants_are_found_again() -> None:
    there = Rates(products=0.62, links=0.5, kernel_seconds=9e-6, memory=0.6)
    measured = [
        Measured(
            job_of(WIDE, plan),
            plan,
            step_time(job_of(WIDE, plan), plan, cluster_of(16, there)).total,
        )
        for plan in PLANS
    ]
    rates, observed = fit(measured, lambda _, rates: cluster_of(16, rates), Rates())
    assert max(abs(each.log_ratio) for each in observed) < 0.03
    before = [step_time(m.job, m.plan, cluster_of(16)).total / m.seconds - 1 for m in measured]
    assert max(map(abs, before)) > 0.2
    unseen = plan_of(WIDE, world=16, tp=4, pp=2, micro_batch=4, sequence_length=4096)
    job = job_of(WIDE, unseen)
    found = step_time(job, unseen, cluster_of(16, rates)).total
    assert found == pytest.approx(step_time(job, unseen, cluster_of(16, there)).total, rel=0.05)
    assert rates.source == "fitted to 6 steps"


def test_one_odd_step_does_not_move_the_others() -> None:
    plan = PLANS[0]
    job = job_of(WIDE, plan)
    truth = step_time(job, plan, cluster_of(16)).total
    steps = [Measured(job, plan, truth)] * 5
    rates, _ = fit(
        [*steps, Measured(job, plan, 2 * truth)], lambda _, r: cluster_of(16, r), Rates()
    )
    assert step_time(job, plan, cluster_of(16, rates)).total == pytest.approx(truth, rel=0.06)


def test_a_prediction_leans_on_what_was_measured_nearby() -> None:
    plan = PLANS[2]
    job = job_of(WIDE, plan)
    observed = (Observation(features(job, plan), math.log(1.3)),)
    here = correction(observed, job, plan, 0.2)
    # A Gaussian process with one point: k / (k + noise²) of what was seen there.
    amplitude = math.log(1.3)
    share = amplitude**2 / (amplitude**2 + 0.04**2)
    assert here.factor == pytest.approx(math.exp(share * math.log(1.3)))
    far = replace(plan, tp=1, pp=16, micro_batch=1, accumulation=512, recompute="full")
    there = correction(observed, job, far, 0.2)
    assert abs(math.log(there.factor)) < 0.01
    assert here.spread < there.spread
    assert correction((), job, plan, 0.2).factor == 1.0


def test_predictions_and_their_parts_lean_alike() -> None:
    plan = PLANS[2]
    job = job_of(WIDE, plan)
    observed = (Observation(features(job, plan), math.log(1.3)),)
    plain = predict(job, plan, cluster_of(16))
    leaning = predict(job, plan, replace(cluster_of(16), observed=observed))
    ratio = leaning.step_seconds.value / plain.step_seconds.value
    assert ratio == pytest.approx(correction(observed, job, plan, 0.2).factor)
    assert leaning.compute == pytest.approx(ratio * plain.compute)


@pytest.mark.parametrize("seed", range(5))
def test_representatives_are_medoids(seed: int) -> None:
    points = [tuple(row) for row in np.random.default_rng(seed).normal(size=(9, 3))]
    chosen = representative(points, 3)

    def sum_of_distances(some: tuple[int, ...] | list[int]) -> float:
        return sum(
            min(sum(abs(a - b) for a, b in zip(p, points[c], strict=True)) for c in some)
            for p in points
        )

    best = min(map(sum_of_distances, itertools.combinations(range(9), 3)))
    assert sum_of_distances(chosen) <= 1.1 * best
    assert len(set(representative(points, 20))) == 9
