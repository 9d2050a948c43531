"""A predicted step in Chrome's trace-event format, which ui.perfetto.dev opens. No torch.

A process is a pipeline rank; its threads are the tracks of `planner.step_slices`, and the memory
is a counter. The format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainwright.files import write_atomically
from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.step_slices import COMPUTE, OPTIMIZER, Slice, step_slices

_WORDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
}
_GIB = 1 << 30
Memory = Sequence[Sequence[tuple[float, float]]]  # by pipeline rank: seconds and bytes


def write_trace(path: Path, prediction: Prediction, memory: Memory = ()) -> None:
    """Write the trace of a predicted step to `path`; `memory` is its devices' over time."""
    write_atomically(path, json.dumps(trace(prediction, memory)))


def trace(prediction: Prediction, memory: Memory = ()) -> dict[str, Any]:
    """The trace of a predicted step as a JSON object."""
    plan = prediction.plan
    events: list[dict[str, Any]] = []
    for rank, slices in enumerate(step_slices(prediction)):
        name = f"pipeline rank {rank}" if plan.pp > 1 else "each worker"
        events += _names(rank, name, tracks := _tracks(slices))
        events += (_complete(rank, tracks.index(each.track), each) for each in slices)
    for rank, changes in enumerate(memory):
        events += (
            {"name": "memory", "ph": "C", "pid": rank, "ts": _micros(time), "args": {"GiB": size}}
            for time, size in ((time, round(size / _GIB, 6)) for time, size in changes)
        )
    step = prediction.step_seconds
    about = {
        "plan": plan.hash,
        "step_seconds": step.value,
        "interval_seconds": [step.low, step.high],
        "rates": prediction.source,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _tracks(slices: Sequence[Slice]) -> list[str]:
    """Kernels first, the optimizer last, dimensions between."""
    dimensions = dict.fromkeys(each.track for each in slices)
    dimensions = {name: None for name in dimensions if name not in (COMPUTE, OPTIMIZER)}
    return [COMPUTE, *dimensions, OPTIMIZER]


def _names(rank: int, name: str, tracks: Sequence[str]) -> Iterator[dict[str, Any]]:
    def told(kind: str, thread: int, value: dict[str, Any]) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": value}

    yield told("process_name", 0, {"name": name})
    yield told("process_sort_index", 0, {"sort_index": rank})
    for thread, track in enumerate(tracks):
        yield told("thread_name", thread, {"name": track})
        yield told("thread_sort_index", thread, {"sort_index": thread})


def _complete(rank: int, thread: int, each: Slice) -> dict[str, Any]:
    start, end = _micros(each.start), _micros(each.end)
    name, details = each.name, dict[str, Any]()
    if each.micro_batch is not None:
        details = {"stage": each.stage, "micro_batch": each.micro_batch}
        if each.track == COMPUTE:
            name = f"{each.name}{each.micro_batch}"
            details["pass"] = _WORDS[each.name]
    return {
        "name": name,
        "cat": each.track,
        "ph": "X",
        "pid": rank,
        "tid": thread,
        "ts": start,
        "dur": round(end - start, 3),
        "args": details,
    }


def _micros(seconds: float) -> float:
    """Microseconds to the nanosecond, so that neighbours end and begin at the same number."""
    return round(seconds * 1e9) / 1e3
