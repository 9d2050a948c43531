"""What a run does with its plan: keeps it, goes on with it, refuses another, tries several."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.training.runs import small_recipe, this_world, train_here
from trainwright.errors import UserError
from trainwright.planner import choose as planner
from trainwright.planner.choose import Choice
from trainwright.planner.cluster.calibration import (
    Calibration,
    machine_facts,
    read_calibration,
    write_calibration,
)
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.plan import Plan
from trainwright.planner.plan_record import Trial
from trainwright.report.records import read_metrics
from trainwright.training import prepare
from trainwright.training import tune as tuning
from trainwright.training.assemble import assemble
from trainwright.training.machine import detect_machine
from trainwright.training.prepare import prepare_run
from trainwright.training.run_directory import RunDirectory, open_run
from trainwright.training.tune import learn_from, tune

QUIET = lambda message: None  # noqa: E731


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No calibration of the machine that the tests run on, and none left there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def prepared(recipe) -> tuple[RunDirectory, Choice]:
    run = open_run(recipe)
    return run, prepare_run(run, recipe, None, QUIET)


def test_a_run_keeps_its_plan_and_what_was_foretold_of_it(tmp_path):
    run, choice = prepared(small_recipe(tmp_path))
    record = run.read_plan_record()
    assert record is not None
    assert (record.plan, record.origin) == (choice.plan, "derived")
    assert record.prediction == choice.prediction
    assert record.prediction is not None
    assert record.prediction.step_seconds.value > 0
    assert len(record.memory) == 1
    told = json.loads(run.plan.read_text())
    assert told["hash"] == json.loads(run.prediction.read_text())["plan"] == choice.plan.hash
    assert not (run.path / "prediction.json.tmp").exists()


def test_a_run_goes_on_with_its_plan_on_the_same_machine(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path, training={"steps": 2})
    train_here(recipe)
    before = RunDirectory(tmp_path / "run").plan.read_text()
    asked = []

    def choose(*arguments, **named):
        asked.append(arguments)
        return choose_plan(*arguments, **named)

    choose_plan = planner.choose_plan
    monkeypatch.setattr(planner, "choose_plan", choose)
    run, choice = prepared(recipe)
    assert not asked
    assert choice.prediction is not None
    assert run.plan.read_text() == before

    def changed(**sections) -> Plan:
        return prepared(small_recipe(tmp_path, **{"training": {"steps": 2}, **sections}))[1].plan

    assert changed(checkpoint={"keep_last": 3}) == choice.plan
    assert not asked
    assert changed(parallel={"micro_batch": 4}).micro_batch == 4
    assert changed(parallel={"micro_batch": 4}).micro_batch == 4
    assert len(asked) == 1
    elsewhere = replace(detect_machine(), launched=2)
    monkeypatch.setattr(prepare, "detect_machine", lambda: elsewhere)
    assert changed(parallel={"micro_batch": 4, "workers": "auto"}).world_size == 2
    assert len(asked) == 2


def test_a_plan_that_is_not_the_runs_own_is_refused(tmp_path):
    recipe = small_recipe(tmp_path, training={"steps": 2})
    train_here(recipe)
    run = RunDirectory(tmp_path / "run")
    text, plan = run.plan.read_text(), run.read_plan()
    another = replace(plan, threads=plan.threads + 1)
    for changed in (text.replace('"threads": ', '"threads": 1'), another.to_json()):
        run.plan.write_text(changed)
        with pytest.raises(UserError, match="not the plan that the run was started with") as caught:
            run.read_plan()
        assert plan.hash in str(caught.value)
        assert "put the file back" in str(caught.value)
        with pytest.raises(UserError, match="not the plan"):  # and so the same run goes nowhere
            prepared(recipe)
    run.plan.unlink()
    assert prepared(recipe)[1].plan == plan  # anew
    # A run of an older release has neither hash nor record.
    values = json.loads(text)
    del values["hash"]
    run.plan.write_text(json.dumps(values))
    run.prediction.unlink()
    assert run.read_plan() == plan
    assert prepared(recipe)[1].plan == plan


@pytest.mark.prove
def test_plans_are_tried_and_the_quickest_is_kept(tmp_path):
    recipe = small_recipe(tmp_path, training={"steps": 30})
    run, choice = prepared(recipe)
    assert choice.prediction is not None
    alone = choice.plan
    many = replace(alone, micro_batch=1, accumulation=8)  # slower on any machine
    impossible = replace(alone, world_size=2, pp=2, stage_layers=(1, 2), accumulation=1)
    ranked = tuple(replace(choice.prediction, plan=plan) for plan in (impossible, many, alone))
    said: list[str] = []
    assert tune(run, replace(choice, ranked=ranked), 3, said.append) == alone
    assert run.read_plan() == alone
    record = run.read_plan_record()
    assert record is not None
    assert (record.origin, json.loads(run.plan.read_text())["origin"]) == ("tuned", "tuned")
    assert record.reason == "tuned: the quickest of 3 plans that were tried"
    failed, slow, quick = record.trials
    assert failed.failure
    assert failed.seconds is None
    assert slow.seconds > quick.seconds > 0
    assert quick.memory_bytes > 0
    assert "failed: " in said[1]
    assert "predicted" in said[2]
    assert "measured" in said[2]
    # Nothing of the trials is left in the run, which begins at its beginning.
    assert not run.checkpoints.exists()
    assert not (run.path / "metrics.jsonl").exists()
    trainer = assemble(run, this_world()).trainer
    assert (trainer.start, trainer.total_steps) == (0, 30)


def tried(monkeypatch, seconds: dict[Plan, float | None]) -> None:
    """Trials that take `seconds`, or fail where that is None."""

    def outcome(run: RunDirectory, foretold: Prediction) -> Trial:
        found, plan = seconds[foretold.plan], foretold.plan
        failure = "out of memory" if found is None else ""
        return Trial(plan, foretold.step_seconds.value, found, failure=failure)

    monkeypatch.setattr(tuning, "try_plan", outcome)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_plan_without_tuning_is_always_among_those_tried(tmp_path, monkeypatch, count: int):
    run, choice = prepared(small_recipe(tmp_path))
    assert choice.prediction is not None
    plans = [replace(choice.plan, threads=10 + number) for number in range(3)]
    tried(monkeypatch, {plans[0]: 3.0, plans[1]: None, plans[2]: 1.0, choice.plan: 2.0})
    ranked = tuple(replace(choice.prediction, plan=plan) for plan in plans)
    # The third is quickest, and among three the run's own takes its place.
    expected = choice.plan if count < 4 else plans[2]
    assert tune(run, replace(choice, ranked=ranked), count, QUIET) == expected
    record = run.read_plan_record()
    assert record is not None
    assert choice.plan in [trial.plan for trial in record.trials]
    assert len(record.trials) == min(count, 4)
    assert record.plan == expected


def test_there_must_be_plans_to_choose_from(tmp_path):
    recipe = small_recipe(tmp_path, parallel={"dp_replicate": 1})
    with pytest.raises(UserError, match="the recipe gives the layout") as caught:
        prepare_run(open_run(recipe), recipe, None, QUIET, plans=2)
    assert "`parallel: auto`" in str(caught.value)


def test_where_no_plan_could_be_tried_the_first_failure_is_told(tmp_path, monkeypatch):
    run, choice = prepared(small_recipe(tmp_path))
    before = run.plan.read_text()
    tried(monkeypatch, {choice.plan: None})
    with pytest.raises(UserError, match=r"none of the 1 plans could be tried; .* out of memory"):
        tune(run, choice, 1, QUIET)
    assert run.plan.read_text() == before


def test_measured_steps_refine_the_calibration(tmp_path):
    recipe = small_recipe(tmp_path, training={"steps": 12})
    machine = detect_machine()
    train_here(recipe)
    run = RunDirectory(tmp_path / "run")
    learn_from(run)
    assert read_calibration(machine) is None  # nothing was measured: there is nothing to refine
    write_calibration(Calibration(machine_facts(machine)))
    learn_from(run)
    after = read_calibration(machine)
    assert after is not None
    assert len(after.observed) == 1
    learn_from(run)
    again = read_calibration(machine)
    assert again is not None
    assert len(again.observed) == 2
    # What was taught is taken out before it is taught again: the same run says the same.
    assert again.observed[1].log_ratio == pytest.approx(again.observed[0].log_ratio, abs=1e-6)
    assert len(read_metrics(run.path)) > 12
