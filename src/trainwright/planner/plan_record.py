"""prediction.json: what a run keeps of how its plan was come by, and of what was foretold of it.

The report puts it beside what was measured; a run that goes on finds its plan in it again. No
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainwright.errors import UserError
from trainwright.planner.cost.prediction import Interval, MemoryPrediction, Prediction
from trainwright.planner.plan import Machine, Origin, Plan
from trainwright.planner.schedules import Action
from trainwright.planner.timeline import Timed, Timeline

RECORD_FILE = "prediction.json"
_MOST_ACTIONS = 20_000  # of a timeline that is kept: beyond, nobody could see them in a picture

Memory = tuple[tuple[tuple[float, float], ...], ...]  # by pipeline rank: seconds and bytes


@dataclass(frozen=True)
class Trial:
    """A plan that was tried: seconds of a step, predicted and measured, and a worker's bytes.

    `failure` says in words why nothing was measured.
    """

    plan: Plan
    predicted: float
    seconds: float | None = None
    memory_bytes: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class PlanRecord:
    """How a run's plan was chosen (`reason` says it in words), on which machine, and what is
    foretold of it.

    `prediction` is None where the model's shape is not known. `memory` is that of each pipeline
    rank's device over a step. `trials` are those of `--tune`.
    """

    plan: Plan
    origin: Origin
    reason: str = ""
    machine: Mapping[str, Any] | None = None
    prediction: Prediction | None = None
    memory: Memory = ()
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> str:
        """The record without its plan, of which it has the hash; `from_json` reads it back."""
        values = {
            "plan": self.plan.hash,
            "origin": self.origin,
            "reason": self.reason,
            "machine": self.machine,
            "prediction": None if self.prediction is None else _values(self.prediction),
            "memory": self.memory,
            "trials": [asdict(trial) for trial in self.trials],
        }
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, text: str, plan: Plan) -> PlanRecord:
        """The record in `text`, of a run of `plan`. Raises `UserError` where it is none."""
        try:
            values = json.loads(text)
            found = values["prediction"]
            return cls(
                plan,
                values["origin"],
                values["reason"],
                values["machine"],
                None if found is None else _prediction(found, plan),
                tuple(tuple((t, size) for t, size in rank) for rank in values["memory"]),
                tuple(_trial(trial) for trial in values["trials"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{RECORD_FILE} cannot be read: {error}",
                fix="delete it: the run goes on without, and is planned anew when it is started",
            ) from None


def recorded_hash(text: str, key: str = "plan") -> str | None:
    """The hash that a record keeps of its plan under `key`; None where it is damaged."""
    try:
        found = json.loads(text)[key]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def lasting_facts(machine: Machine) -> dict[str, Any]:
    """What a plan is made for, of a machine: not what happens to be free on it."""
    facts = asdict(machine)
    del facts["free_bytes"]
    return facts


def _values(prediction: Prediction) -> dict[str, Any]:
    timeline = prediction.timeline
    if timeline is not None and sum(map(len, timeline.ranks)) > _MOST_ACTIONS:
        prediction = replace(prediction, timeline=None)
    values = asdict(prediction)
    del values["plan"]
    return values


def _prediction(values: dict[str, Any], plan: Plan) -> Prediction:
    memory, timeline = values.pop("memory"), values.pop("timeline")
    total = Interval(**memory.pop("total"))
    return Prediction(
        plan=plan,
        step_seconds=Interval(**values.pop("step_seconds")),
        memory=MemoryPrediction(total=total, **memory),
        timeline=None if timeline is None else _timeline(timeline),
        **values,
    )


def _timeline(values: dict[str, Any]) -> Timeline:
    ranks: Sequence[Any] = values["ranks"]
    return Timeline(
        ranks=tuple(
            tuple(Timed(Action(*action), start, end) for action, start, end in rank)
            for rank in ranks
        ),
        makespan=values["makespan"],
        idle=tuple(values["idle"]),
        in_flight=tuple(values["in_flight"]),
    )


def _trial(values: dict[str, Any]) -> Trial:
    return Trial(Plan.from_json(json.dumps(values.pop("plan"))), **values)
