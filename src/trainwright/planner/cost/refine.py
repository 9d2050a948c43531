"""What a run's measured steps teach the next prediction on the same machine."""

from __future__ import annotations

import math
from dataclasses import replace

from trainwright.planner.cluster.calibration import Calibration
from trainwright.planner.cluster.describe import Observation
from trainwright.planner.cost.residual import correction, features
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan

_REMEMBERED = 64  # runs; older ones say little of the software that there is now
_MOST_OFF = 3.0  # beyond, a run says more of what else was going on than of the machine


def refine(
    calibration: Calibration, job: Job, plan: Plan, predicted: float, measured: float
) -> Calibration:
    """`calibration` with a run of `plan`: its step took `measured` seconds, not `predicted`.

    `predicted` is what was made of it with this calibration, so that what earlier runs taught is
    taken out of it first. Raises ValueError for times that are not positive.
    """
    if not (predicted > 0 and measured > 0):
        raise ValueError("seconds of a step are positive")
    taught = correction(calibration.lessons, job, plan, 0.0).factor
    ratio = min(max(measured / (predicted / taught), 1 / _MOST_OFF), _MOST_OFF)
    seen = Observation(features(job, plan), math.log(ratio))
    return replace(calibration, observed=(*calibration.observed, seen)[-_REMEMBERED:])
