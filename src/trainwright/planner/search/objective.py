"""What a plan is chosen by, and what it must keep: time, money, energy, carbon; memory, deadline.

Several aims are mixed as a weighted geometric mean: with weights 0.7 and 0.3, one percent more of
the first is worth 0.7 / 0.3 percent less of the second, in whatever units they are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trainwright.errors import Mistake, UserError
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.job import Job
from trainwright.planner.shapes import parameter_count

AIMS = ("time", "cost", "energy", "carbon")
_NOTHING = 1e-300  # stands in for 0, which has no logarithm
RESTART_SECONDS = 300.0  # to find a dead node, start anew and read the checkpoint


@dataclass(frozen=True)
class Objective:
    """How much each aim counts; the weights are shares of their sum.

    `time` is a step's seconds, `cost` its dollars, `energy` its joules and `carbon` its grams, all
    of them with what failures of nodes undo.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"time": 1.0})

    def __post_init__(self) -> None:
        unknown = [name for name in self.weights if name not in AIMS]
        if unknown or not self.weights or min(self.weights.values()) <= 0:
            what = f"{unknown[0]!r} is no aim" if unknown else "every aim needs a weight above 0"
            fix = f"choose among {', '.join(AIMS)}, such as `time` or `time=0.7,energy=0.3`"
            raise UserError(Mistake(what, fix, key="objective"))

    @classmethod
    def parse(cls, text: str) -> Objective:
        """`time`, or several aims with weights: `time=0.7,energy=0.3`. Raises `UserError`."""
        weights = {}
        for part in text.split(","):
            name, _, weight = part.partition("=")
            try:
                weights[name.strip()] = float(weight or 1)
            except ValueError:
                what = f"{weight.strip()!r} is no weight"
                fix = "write a number, such as `time=0.7,energy=0.3`"
                raise UserError(Mistake(what, fix, key="objective")) from None
        return cls(weights)

    def check(self, cluster: Cluster) -> None:
        """Raises `UserError` where the machine's description lacks what an aim is counted by."""
        lacking = {
            "cost": ("dollars_per_hour", "dollars_per_hour"),
            "energy": ("device.watts", "watts"),
            "carbon": ("grams_per_kwh", "grams_per_kwh"),
        }
        mistakes = []
        for aim, (where, key) in lacking.items():
            pools = [
                pool.name
                for pool in cluster.pools
                if not getattr(pool.device if "." in where else pool, key)
            ]
            if aim in self.weights and pools:
                what = f"the objective is {aim}, and pool {pools[0]} has no `{key}`"
                mistakes.append(Mistake(what, f"write its `{key}`", key="cluster"))
        if mistakes:
            raise UserError(mistakes)

    def score(self, prediction: Prediction, goodput: float = 1.0) -> float:
        """What is to be small: of a token, with the share of time that failures leave."""
        values = {
            "time": prediction.step_seconds.value,
            "cost": prediction.dollars,
            "energy": prediction.joules,
            "carbon": prediction.grams,
        }
        tokens = prediction.plan.batch_tokens
        return float(self.mixed({k: v / goodput for k, v in values.items()}, tokens))

    def mixed(self, values: Mapping[str, Any], tokens: float) -> Any:
        """The weighted geometric mean of a step's values by aim, of a token; of arrays too."""
        total = sum(self.weights.values())
        logarithms = (
            weight / total * np.log(np.maximum(values[name], _NOTHING) / tokens)
            for name, weight in self.weights.items()
        )
        return np.exp(sum(logarithms))


class Broken(NamedTuple):
    """A constraint that a plan does not keep."""

    name: str  # memory, deadline or power
    value: float
    limit: float


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep, besides fitting into its devices; None leaves it free.

    Bytes of a device; seconds for a run of `tokens`; watts of all devices together, on average.
    """

    memory_bytes: float | None = None
    deadline_seconds: float | None = None
    tokens: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        if self.deadline_seconds is not None and not self.tokens:
            what = "a deadline is of a run, and nothing says how long that is"
            raise UserError(Mistake(what, "write `training.tokens`, or leave the deadline out"))

    def broken(self, prediction: Prediction, goodput: float = 1.0) -> list[Broken]:
        """What `prediction` does not keep, its devices' memory first."""
        memory, seconds = prediction.memory, prediction.step_seconds.value
        found = []
        limit = min(memory.limit, self.memory_bytes or math.inf)
        if memory.total.value > limit:
            found.append(Broken("memory", memory.total.value, limit))
        if self.deadline_seconds is not None and self.tokens is not None:
            run = self.tokens / prediction.plan.batch_tokens * seconds / goodput
            if run > self.deadline_seconds:
                found.append(Broken("deadline", run, self.deadline_seconds))
        if self.watts is not None and prediction.joules / seconds > self.watts:
            found.append(Broken("power", prediction.joules / seconds, self.watts))
        return found


def goodput(job: Job, cluster: Cluster, workers: int) -> float:
    """Share of the time that failing nodes leave to training, with the best checkpoint interval.

    Nodes fail independently and at any time; a failure loses what was done since the last
    checkpoint, and a restart. An interval of t between checkpoints that take c each costs
    (e^((t + c) / M) - 1) (M + R) of time on a machine that fails every M on average and restarts
    in R (Daly 2006, Future Generation Computer Systems 22). 1 where nothing is known of failures.
    """
    rate, nodes, left = 0.0, 0, workers
    slowest = math.inf
    for pool in cluster.pools:
        used = min(pool.nodes, -(-left // pool.devices_per_node)) if left > 0 else 0
        rate += used * pool.failures_per_hour / 3600
        nodes += used
        slowest = min(slowest, pool.between.up if used else math.inf)
        left -= used * pool.devices_per_node
    if not rate:
        return 1.0
    # Every node writes its part through the link by which it reaches the others.
    saved = parameter_count(job.config) * (job.stack.weight_bytes + job.stack.optimizer_bytes)
    write = saved / nodes / slowest
    between = 1 / rate
    return max(
        interval / (math.expm1((interval + write) / between) * (between + RESTART_SECONDS))
        for interval in (math.sqrt(2 * write * between) * 1.1**power for power in range(-20, 21))
    )
