"""What is foretold of a plan, with its interval. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainwright.planner.plan import Plan
from trainwright.planner.timeline import Timeline


@dataclass(frozen=True)
class Interval:
    """A number that is not known exactly: four times of five it is between `low` and `high`."""

    low: float
    value: float
    high: float

    @classmethod
    def around(cls, value: float, spread: float) -> Interval:
        """`spread` is the relative half width."""
        return cls(value / (1 + spread), value, value * (1 + spread))


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of the fullest device at its fullest, by what they are for, and what it has."""

    total: Interval
    limit: float
    lines: Mapping[str, float] = field(default_factory=dict)
    pp_rank: int = 0

    @property
    def fits(self) -> bool:
        """Whether it is likely to fit."""
        return self.total.value <= self.limit


@dataclass(frozen=True)
class Prediction:
    """A plan's step: times in seconds, work in FLOP, money in dollars, carbon in grams of CO2.

    The step is `compute` + all of `exposed` + `idle` + `optimizer` + `constant`, of the rank that
    computes longest. `timeline` is the pipeline's; None where it was not simulated.
    """

    plan: Plan
    step_seconds: Interval
    memory: MemoryPrediction
    compute: float
    exposed: Mapping[str, float]  # communication that nothing hides, by dimension of the mesh
    idle: float  # waiting for other stages
    optimizer: float
    constant: float
    model_flops: float  # of the whole step and cluster, as MFU counts them
    peak_flops: float  # of all devices together, in the plan's type of products
    joules: float
    dollars: float
    grams: float
    timeline: Timeline | None = None
    source: str = ""  # where the rates are from: measured here, or a data sheet

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.plan.batch_tokens / self.step_seconds.value

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the devices could do in the step's time."""
        return self.model_flops / (self.step_seconds.value * self.peak_flops)

    @property
    def bubble(self) -> float:
        """Share of the step that the pipeline idles."""
        return self.idle / self.step_seconds.value

    @property
    def joules_per_token(self) -> float:
        """Of all devices together."""
        return self.joules / self.plan.batch_tokens
