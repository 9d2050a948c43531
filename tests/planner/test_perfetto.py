"""The trace of a predicted step: the format's rules, and times that add up to the prediction."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.planner.test_plan_record import prediction_of
from trainwright.planner.perfetto import trace, write_trace
from trainwright.planner.step_slices import passes_end, step_slices

# "Trace Event Format" (Google, 2016): what each phase must have, beside name, ph and pid.
REQUIRED = {"X": {"ts", "dur", "tid", "cat"}, "M": {"args"}, "C": {"ts", "args"}}
METADATA = {"process_name": str, "process_sort_index": int, "thread_name": str,
            "thread_sort_index": int}  # fmt: skip


def check_format(document: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Holds a trace against the format's rules; its complete events by process and thread."""
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    for event in document["traceEvents"]:
        assert REQUIRED[event["ph"]] <= set(event)
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            [value] = event["args"].values()
            assert isinstance(value, METADATA[event["name"]])
            named |= {(event["pid"], event["tid"])} if event["name"] == "thread_name" else set()
            continue
        assert event["ts"] >= 0
        assert math.isfinite(event["ts"])
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        else:
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append(event)
    assert set(threads) <= named
    for events in threads.values():
        # Slices of a thread must nest; ours follow one another.
        ordered = sorted(events, key=lambda event: event["ts"])
        for before, after in pairwise(ordered):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    return threads


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble", "zbv", "dualpipev"])
def test_the_trace_keeps_the_format_and_adds_up_to_the_prediction(
    schedule: str, tmp_path: Path
) -> None:
    foretold = prediction_of(schedule, ranks=4, micro_batches=8)
    file = tmp_path / "out" / "trace.json"
    write_trace(file, foretold, [[(0.0, 1 << 30), (0.5, 3 << 30)]] * 4)
    document = json.loads(file.read_text())
    threads = check_format(document)
    by_process = defaultdict(lambda: defaultdict(float))
    end = 0.0
    for (process, _), events in threads.items():
        for event in events:
            by_process[process][event["cat"]] += event["dur"] / 1e6
            end = max(end, (event["ts"] + event["dur"]) / 1e6)
    assert set(by_process) == set(range(4))
    for tracks in by_process.values():
        assert tracks["compute"] == pytest.approx(foretold.compute)
        assert tracks["tp"] == pytest.approx(foretold.exposed["tp"])
        assert tracks["replicas"] == pytest.approx(foretold.exposed["replicas"])
        assert tracks["optimizer"] == pytest.approx(foretold.optimizer)
    assert end == pytest.approx(foretold.step_seconds.value - foretold.constant)
    # Every pass of every micro-batch and stage, once.
    every = [event for events in threads.values() for event in events]
    compute = [event for event in every if event["cat"] == "compute"]
    passes = [(e["name"][0], e["args"]["stage"], e["args"]["micro_batch"]) for e in compute]
    assert len(set(passes)) == len(passes)
    assert sum(kind == "F" for kind, _, _ in passes) == foretold.plan.stages * 8
    counters = [event for event in document["traceEvents"] if event["ph"] == "C"]
    assert [event["args"]["GiB"] for event in counters[:2]] == [1, 3]
    assert [event["pid"] for event in counters] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert document["otherData"]["plan"] == foretold.plan.hash


@pytest.mark.parametrize(
    ("zero", "within"), [(0, 0.0), (1, 0.0), (3, 0.4)], ids=["replicas", "zero 1", "zero 3"]
)
def test_without_a_pipeline_micro_batches_follow_one_another(zero: int, within: float) -> None:
    piped = prediction_of()
    shards = 2 if zero else 1
    plan = replace(
        piped.plan, pp=1, world_size=2, dp_replicate=2 // shards, dp_shard=shards, zero=zero,
        stage_layers=(), accumulation=3,
    )  # fmt: skip
    name = "fsdp" if zero else "replicas"
    foretold = replace(
        piped,
        plan=plan,
        timeline=None,
        compute=2.0,
        exposed={name: 0.4},
        idle=0.0,
        step_seconds=replace(piped.step_seconds, value=2.0 + 0.4 + 0.02 + 0.01),
    )
    assert passes_end(foretold) == pytest.approx(2.0 + within)
    [slices] = step_slices(foretold)
    compute = [each for each in slices if each.track == "compute"]
    assert [each.name for each in compute] == ["F", "B"] * 3
    assert sum(each.end - each.start for each in compute) == pytest.approx(2.0)
    assert sum(each.end - each.start for each in slices if each.track == name) == pytest.approx(0.4)
    assert max(each.end for each in slices) == pytest.approx(2.42)
    check_format(trace(foretold))
