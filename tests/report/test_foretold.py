"""The report's predicted step: its numbers beside the measured ones, and its pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.planner.test_plan_record import MACHINE, prediction_of
from trainwright.planner.cost.prediction import Interval
from trainwright.planner.plan_record import PlanRecord, Trial, lasting_facts
from trainwright.planner.step_slices import step_slices
from trainwright.report.foretold import foretold_charts, plan_record, step_rows
from trainwright.report.history import read_history
from trainwright.report.html import write_report
from trainwright.report.plots import LEFT, RIGHT
from trainwright.report.step_pictures import memory_picture, timeline_picture


def record_of(schedule: str = "1f1b", ranks: int = 2, micro_batches: int = 4) -> PlanRecord:
    foretold = prediction_of(schedule, ranks, micro_batches)
    foretold = replace(foretold, step_seconds=Interval(0.9 * 2, 2.0, 1.2 * 2))
    memory = tuple(((0.0, 1e9), (0.5, 2e9 + rank * 1e8), (2.0, 1e9)) for rank in range(ranks))
    trials = (
        Trial(foretold.plan, 2.0, 1.9, 3e9),
        Trial(replace(foretold.plan, pp=1, dp_replicate=4), 2.2, failure="ran out of memory"),
    )
    facts = lasting_facts(MACHINE)
    return PlanRecord(foretold.plan, "tuned", "the best of 2", facts, foretold, memory, trials)


def run_with(make_run, run_records, record: PlanRecord, seconds: float) -> Path:
    directory = make_run(records=run_records(9, seconds=seconds))
    (directory / "plan.json").write_text(record.plan.to_json(record.origin))
    (directory / "prediction.json").write_text(record.to_json())
    return directory


def test_predicted_stands_beside_measured(make_run, run_records):
    record = record_of()
    directory = run_with(make_run, run_records, record, seconds=2.1)
    history = read_history(directory)
    assert plan_record(history) == record
    time, tokens, memory = step_rows(history, plan_record(history))
    assert time == ("step time", "2.00 s", "1.80 s to 2.40 s", "2.10 s", "+5.0%")
    # 8 rows of one token each in two seconds, and as the interval has it.
    assert record.plan.batch_tokens == 8
    assert tokens == ("tokens per second", "4.00", "3.33 to 4.44", "3.81", "-4.8%")
    assert memory[:4] == ("memory of the first worker", "3.00 GB", "2.73 GB to 3.30 GB", "1.14 GB")
    assert memory.difference.endswith(", outside")
    page = write_report(directory).read_text()
    assert "The plan: the best of 2. Rates: assumed." in page
    assert "<td>ran out of memory</td>" in page
    assert page.count('<svg class="chart"') == 7


def test_the_first_worker_is_not_always_the_fullest(make_run, run_records):
    record = record_of()
    assert record.prediction is not None
    fullest = replace(record.prediction.memory, pp_rank=1)
    record = replace(record, prediction=replace(record.prediction, memory=fullest))
    history = read_history(run_with(make_run, run_records, record, seconds=2.1))
    memory = step_rows(history, record)[2]
    assert memory.predicted == f"{3.0 * 2.0 / 2.1:.2f} GB"


def test_runs_without_a_prediction_are_as_before(make_run, run_records):
    directory = make_run()
    assert "Predicted" not in write_report(directory).read_text()
    record = replace(record_of(), prediction=None, memory=(), trials=())
    (directory / "plan.json").write_text(record.plan.to_json())
    for text in (record.to_json(), "{torn"):
        (directory / "prediction.json").write_text(text)
        assert "Predicted" not in write_report(directory).read_text()


def boxes(drawing: str) -> dict[str, list[tuple[float, float, float]]]:
    """Left, right and top of every box of a picture, by kind."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for kind, path in re.findall(r'<path class="slice (\w+)"[^>]* d="([^"]+)"', drawing):
        for left, top, right in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", path):
            found.setdefault(kind, []).append((float(left), float(right), float(top)))
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "zbv"])
def test_the_timeline_is_drawn_to_scale(schedule):
    record = record_of(schedule, ranks=4, micro_batches=6)
    assert record.prediction is not None
    end = record.prediction.timeline.makespan + 0.08  # type: ignore[union-attr]
    foretold = replace(record.prediction, step_seconds=Interval.around(end, 0.1))
    drawing, legend = timeline_picture(foretold)
    found = boxes(drawing)
    assert [kind for kind, _ in legend] == [
        kind for kind in ("F", "B", "I", "W", "sends", "updates") if kind in found
    ]
    width = 1100 - LEFT - RIGHT
    slices = [each for rank in step_slices(foretold) for each in rank]
    assert sum(map(len, found.values())) == len(slices)
    drawn = sorted((left, right) for each in found.values() for left, right, _ in each)
    wanted = sorted((LEFT + width * e.start / end, LEFT + width * e.end / end) for e in slices)
    for pixels, exact in zip(drawn, wanted, strict=True):
        assert pixels == pytest.approx(exact, abs=0.46)  # with the gap before the next
    # A row's boxes do not lie over one another.
    rows: dict[float, list[tuple[float, float]]] = {}
    for each in found.values():
        for left, right, top in each:
            rows.setdefault(top, []).append((left, right))
    assert len(rows) == 4
    for row in rows.values():
        row.sort()
        assert all(a[1] <= b[0] + 0.11 for a, b in pairwise(row))


def test_many_ranks_and_micro_batches_stay_small_and_readable():
    record = record_of("1f1b", ranks=64, micro_batches=128)
    [timeline, memory] = foretold_charts(record)
    assert len(timeline.drawing) < 1_000_000
    assert 10 < timeline.drawing.count(">rank ") < 64
    assert len(memory.legend) == 6  # five ranks and the limit


def test_memory_is_drawn_with_its_limit_where_that_is_near():
    record = record_of()
    assert record.prediction is not None
    assert [label for _, label in memory_picture(record)[1]] == ["rank 0", "rank 1"]
    limited = replace(record.prediction.memory, limit=3e9)
    near = replace(record, prediction=replace(record.prediction, memory=limited))
    assert [label for _, label in memory_picture(near)[1]] == ["rank 0", "rank 1", "limit"]
