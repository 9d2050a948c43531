"""`train --tune K`: the K plans that are predicted to be best, each tried for a few steps.

A trial is a real run in a directory of its own, with the run's model, data and workers, that saves
and evaluates nothing. What fails, as for lack of memory, is an outcome like any other.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trainwright.errors import UserError
from trainwright.files import write_atomically
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.planner.choose import Choice
from trainwright.planner.cluster.calibration import read_calibration, write_calibration
from trainwright.planner.cluster.this_machine import this_machine
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.cost.refine import refine
from trainwright.planner.cost.step import predict
from trainwright.planner.explain import in_bytes, in_seconds
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine, Plan
from trainwright.planner.plan_record import PlanRecord, Trial
from trainwright.planner.plan_words import in_words
from trainwright.planner.search.asked import asked_of
from trainwright.recipe.load import dump_recipe
from trainwright.recipe.schema import Tracking
from trainwright.report.records import Record, read_metrics
from trainwright.training.launch import WorkerFailed, launch_workers
from trainwright.training.machine import detect_machine
from trainwright.training.run_directory import RunDirectory

_WARM_UP, _MEASURED = 2, 4  # steps of a trial: the first allocate and compile
_FEWEST_STEPS = 8  # of a run that the calibration learns from
_NOT_COPIED = ("checkpoints", "export", "gguf", "logs", "tasks", "metrics.jsonl", "report.html")


def tune(run: RunDirectory, choice: Choice, count: int, say: Callable[[str], None]) -> Plan:
    """Try `count` of the ranked plans of a prepared run, and leave it the quickest.

    The plan that the run would have had is among them. Raises UserError where none could be
    measured, and RunInterrupted.
    """
    assert choice.prediction is not None  # or there would be nothing to choose from
    machine = detect_machine()
    foretold = [*choice.ranked[:count]]
    if choice.plan not in (each.plan for each in foretold):
        foretold[count - 1 :] = [choice.prediction]
    say(f"  trying {len(foretold)} plans, {_WARM_UP + _MEASURED} steps each")
    trials = []
    for prediction in foretold:
        trials.append(try_plan(run, prediction))
        say(f"  {_line(trials[-1])}")
    measured = [trial for trial in trials if trial.seconds is not None]
    if not measured:
        raise UserError(
            f"none of the {len(trials)} plans could be tried; the first: {trials[0].failure}",
            fix="leave `--tune` out to see the whole of its message",
        )
    if choice.question is not None:
        for trial in measured:
            learn(machine, choice.question.job, trial.plan, trial.seconds)
    best = min(measured, key=lambda trial: trial.seconds or 0.0)
    say(f"  the quickest: {in_words(best.plan)}")
    plural = "s that were" if len(trials) > 1 else " that was"
    chosen = replace(
        choice,
        plan=best.plan,
        origin="tuned",
        reason=f"tuned: the quickest of {len(trials)} plan{plural} tried",
        prediction=next(each for each in foretold if each.plan == best.plan),
    )
    record = chosen.record(machine)
    run.write_plan(replace(record, trials=tuple(trials)))
    return best.plan


def try_plan(run: RunDirectory, prediction: Prediction) -> Trial:
    """Train a few steps by a plan, in a directory of their own."""
    trial = Trial(prediction.plan, prediction.step_seconds.value)
    with tempfile.TemporaryDirectory(prefix="trainwright-trial-") as folder:
        there = RunDirectory(Path(folder) / "run")
        shutil.copytree(run.path, there.path, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        recipe = run.read_recipe().model_copy(update={"tracking": Tracking()})
        write_atomically(there.resolved, dump_recipe(recipe))
        there.write_plan(PlanRecord(trial.plan, "searched"))
        there.logs.mkdir()
        try:
            launch_workers(there.path, trial.plan, trial_steps=_WARM_UP + _MEASURED)
        except (WorkerFailed, UserError) as failure:
            return replace(trial, failure=_first_line(failure))
        steps = _steps(read_metrics(there.path))
    if len(steps) <= _WARM_UP:  # the run is that short
        steps = [*steps[-1:]] * (_WARM_UP + 1)
    seconds = statistics.median(step["seconds"] for step in steps[_WARM_UP:])
    memory = max((step["memory_bytes"] or 0 for step in steps), default=0)
    return replace(trial, seconds=seconds, memory_bytes=memory or None)


def learn_from(run: RunDirectory) -> None:
    """Let the machine's calibration, if it has one, learn from the steps that the run took last."""
    machine = detect_machine()
    record = run.read_plan_record()
    if record is None or read_calibration(machine) is None:
        return
    hf_config = run.read_model_config()
    records = read_metrics(run.path)
    starts = [number for number, each in enumerate(records) if each["kind"] == "start"]
    steps = _steps(records[starts[-1] :] if starts else [])
    if hf_config["model_type"] not in FAMILIES or len(steps) < _FEWEST_STEPS:
        return
    recipe, config = run.read_recipe(), decoder_config(hf_config)
    job = asked_of(recipe, config, this_machine(machine)).job
    learn(machine, job, record.plan, statistics.median(step["seconds"] for step in steps))


def learn(machine: Machine, job: Job, plan: Plan, seconds: float | None) -> None:
    """Let the calibration of `machine`, if it has one, learn that a step took so long."""
    calibration = read_calibration(machine)
    if calibration is None or not seconds:
        return
    there = this_machine(machine, calibration, workers=plan.world_size)
    predicted = predict(job, plan, there, simulated=False).step_seconds.value
    write_calibration(refine(calibration, job, plan, predicted, seconds))


def _steps(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "step"]


def _first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else type(failure).__name__


def _line(trial: Trial) -> str:
    """A trial for the screen, predicted and measured side by side."""
    words = f"{in_words(trial.plan)}, micro-batch {trial.plan.micro_batch}"
    line = f"{words:<48} predicted {in_seconds(trial.predicted)}, "
    if trial.seconds is None:
        return f"{line}failed: {trial.failure}"
    difference = 100 * (trial.seconds / trial.predicted - 1)
    line += f"measured {in_seconds(trial.seconds)} ({difference:+.0f}%)"
    return line + (f", {in_bytes(trial.memory_bytes)}" if trial.memory_bytes else "")
