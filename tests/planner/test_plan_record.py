"""What a run keeps of its plan: read back it is the same, and what was changed is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trainwright.errors import UserError
from trainwright.planner.cost.prediction import Interval, MemoryPrediction, Prediction
from trainwright.planner.plan import Machine, Plan
from trainwright.planner.plan_record import PlanRecord, Trial, lasting_facts, recorded_hash
from trainwright.planner.schedules import make_schedule, placement
from trainwright.planner.timeline import simulate

MACHINE = Machine(devices=1, device_kind="cpu", cores=8, memory_bytes=1 << 34, free_bytes=1 << 33)


def prediction_of(schedule: str = "1f1b", ranks: int = 2, micro_batches: int = 4) -> Prediction:
    """A prediction with round numbers: stages of 0.1 s forward and 0.2 s back."""
    virtual = 2 if schedule in ("zbv", "dualpipev") else 1
    plan = replace(
        Plan.alone(), world_size=2 * ranks, dp_replicate=2, pp=ranks, accumulation=micro_batches,
        schedule=schedule, virtual_stages=virtual, stage_layers=(2,) * ranks * virtual,
    )  # fmt: skip
    places = placement(schedule, ranks, virtual)
    even = [0.1] * len(places)
    actions = make_schedule(schedule, ranks, virtual, micro_batches)
    timeline = simulate(actions, places, even, even, even)
    busy = 0.3 * virtual * micro_batches
    return Prediction(
        plan=plan,
        step_seconds=Interval.around(timeline.makespan + 0.05 + 0.02 + 0.01, 0.2),
        memory=MemoryPrediction(Interval.around(3e9, 0.1), 8e9, {"weights": 2e9, "logits": 1e9}),
        compute=0.75 * busy,
        exposed={"tp": 0.25 * busy, "replicas": 0.05},
        idle=timeline.makespan - busy,
        optimizer=0.02,
        constant=0.01,
        model_flops=1e12,
        peak_flops=1e13,
        joules=50.0,
        dollars=0.0,
        grams=0.0,
        timeline=timeline,
        source="assumed",
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_record_is_read_back_as_it_was(schedule: str) -> None:
    foretold = prediction_of(schedule)
    record = PlanRecord(
        foretold.plan,
        "tuned",
        "the best of 2",
        lasting_facts(MACHINE),
        foretold,
        (((0.0, 1e9), (0.1, 2e9)), ((0.0, 1e9),)),
        (
            Trial(foretold.plan, 1.5, 1.4, 2e9),
            Trial(Plan.alone(), 1.6, failure="ran out of memory"),
        ),
    )
    text = record.to_json()
    assert PlanRecord.from_json(text, foretold.plan) == record
    assert recorded_hash(text) == foretold.plan.hash
    unknown = replace(record, prediction=None)
    assert PlanRecord.from_json(unknown.to_json(), foretold.plan) == unknown


def test_a_very_long_timeline_is_left_out() -> None:
    foretold = prediction_of(micro_batches=6000)
    text = PlanRecord(foretold.plan, "searched", prediction=foretold).to_json()
    read = PlanRecord.from_json(text, foretold.plan).prediction
    assert read == replace(foretold, timeline=None)


def test_what_a_plan_is_made_for_does_not_follow_what_is_free() -> None:
    assert lasting_facts(MACHINE) == lasting_facts(replace(MACHINE, free_bytes=1))
    assert lasting_facts(MACHINE) != lasting_facts(replace(MACHINE, launched=2))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 1, "prediction": 2}'])
def test_damaged_records(text: str) -> None:
    assert recorded_hash(text) is None
    with pytest.raises(UserError, match=r"prediction\.json cannot be read"):
        PlanRecord.from_json(text, Plan.alone())


def test_a_plan_file_whose_contents_were_changed_is_refused() -> None:
    plan = prediction_of().plan
    values = json.loads(plan.to_json("searched"))
    assert (values["hash"], values["origin"]) == (plan.hash, "searched")
    assert Plan.from_json(json.dumps(values)) == plan
    values["micro_batch"] = 3
    with pytest.raises(UserError, match="not the plan that the run was started with") as caught:
        Plan.from_json(json.dumps(values))
    assert plan.hash in str(caught.value)
    del values["hash"]  # of an older release
    assert Plan.from_json(json.dumps(values)) == replace(plan, micro_batch=3)
