"""The measured step beside the predicted one, and the predicted one in pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from markupsafe import Markup

from trainwright.errors import UserError
from trainwright.planner.cost.prediction import Interval
from trainwright.planner.plan import Plan
from trainwright.planner.plan_record import RECORD_FILE, PlanRecord
from trainwright.planner.plan_words import in_words
from trainwright.report.charts import Chart
from trainwright.report.history import History, finite, median
from trainwright.report.step_pictures import memory_picture, timeline_picture
from trainwright.report.tables import UNKNOWN, bytes_text, significant
from trainwright.report.traffic import measured_traffic, predicted_traffic


class StepRow(NamedTuple):
    """One figure of a step as text; `difference` is of the measured from the predicted."""

    name: str
    predicted: str
    interval: str  # that holds four of five
    measured: str
    difference: str


class TrialRow(NamedTuple):
    """A plan that `--tune` tried, as text; `measured` is the failure where there was one."""

    plan: str
    predicted: str
    measured: str
    difference: str
    memory: str


def plan_record(history: History) -> PlanRecord | None:
    """What the run kept of its plan; None where it kept nothing that can be read."""
    try:
        plan = Plan.from_json(history.texts["plan.json"])
        return PlanRecord.from_json(history.texts[RECORD_FILE], plan)
    except (LookupError, UserError):
        return None


def step_rows(history: History, record: PlanRecord | None) -> list[StepRow]:
    """Predicted beside measured: time, tokens a second, memory, traffic; medians over the steps."""
    if record is None or record.prediction is None:
        return []
    foretold = record.prediction
    seconds = median(history.columns["seconds"])
    tokens, step = foretold.plan.batch_tokens, foretold.step_seconds
    rows = [
        _row("step time", step, seconds, seconds_text),
        _row(
            "tokens per second",
            Interval(tokens / step.high, tokens / step.value, tokens / step.low),
            tokens / seconds if seconds else None,
            lambda value: f"{value:,.0f}" if value >= 100 else significant(value),
        ),
        _row(
            "memory of the first worker",
            _first_worker(record),
            max(finite(history.columns["memory_bytes"]), default=None),
            bytes_text,
        ),
    ]
    sent, measured = sum(predicted_traffic(history).values()), measured_traffic(history)
    if measured:
        exact = Interval(sent, sent, sent)
        rows.append(_row("sent by the first worker", exact, measured, bytes_text))
    return rows


def foretold_charts(record: PlanRecord | None) -> list[Chart]:
    """The predicted step's timeline and memory, as far as they were kept."""
    if record is None or record.prediction is None:
        return []
    charts = []
    foretold = record.prediction
    if foretold.timeline is not None or foretold.plan.pp == 1:
        drawing, legend = timeline_picture(foretold)
        charts.append(Chart("Predicted step", Markup(drawing), legend, True))
    if record.memory:
        drawing, legend = memory_picture(record)
        charts.append(Chart("Predicted memory", Markup(drawing), legend, True))
    return charts


def trial_rows(record: PlanRecord | None) -> list[TrialRow]:
    """The plans that were tried before the run, in the order of their predictions."""
    rows = []
    for trial in () if record is None else record.trials:
        plan, predicted = in_words(trial.plan), seconds_text(trial.predicted)
        memory = bytes_text(trial.memory_bytes)
        if trial.seconds is None:
            rows.append(TrialRow(plan, predicted, trial.failure, UNKNOWN, memory))
            continue
        difference = f"{100 * (trial.seconds / trial.predicted - 1):+.1f}%"
        rows.append(TrialRow(plan, predicted, seconds_text(trial.seconds), difference, memory))
    return rows


def seconds_text(value: float) -> str:
    """A step's time with three digits: `1.24 s`, `35.1 ms`."""
    return f"{significant(value)} s" if value >= 1 else f"{significant(1e3 * value)} ms"


def _first_worker(record: PlanRecord) -> Interval:
    """The fullest device's interval, scaled where the first worker is not one of the fullest."""
    assert record.prediction is not None
    total, fullest = record.prediction.memory.total, record.prediction.memory.pp_rank
    if fullest == 0 or not record.memory:
        return total
    share = max(s for _, s in record.memory[0]) / max(s for _, s in record.memory[fullest])
    return Interval(share * total.low, share * total.value, share * total.high)


def _row(
    name: str, foretold: Interval, measured: float | None, text: Callable[[float], str]
) -> StepRow:
    interval = f"{text(foretold.low)} to {text(foretold.high)}"
    if foretold.low == foretold.high:
        interval = "exact"
    if measured is None:
        return StepRow(name, text(foretold.value), interval, UNKNOWN, UNKNOWN)
    difference = UNKNOWN
    if foretold.value:
        difference = f"{100 * (measured / foretold.value - 1):+.1f}%"
        if not foretold.low * 0.9999 <= measured <= foretold.high * 1.0001:
            difference += ", outside"
    return StepRow(name, text(foretold.value), interval, text(measured), difference)
