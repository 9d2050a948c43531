"""What the first worker sent in a step, dimension by dimension, beside what the plan foretells."""

from __future__ import annotations

import json
import statistics
from typing import Any, NamedTuple

from trainwright.errors import UserError
from trainwright.models.families import decoder_config
from trainwright.planner.plan import Plan
from trainwright.planner.traffic import traffic_bytes
from trainwright.report.history import History
from trainwright.report.tables import UNKNOWN, bytes_text, significant


class TrafficRow(NamedTuple):
    """One dimension of parallelism: medians over the run's steps, as text."""

    dimension: str
    measured: str
    predicted: str
    time: str
    calls: str


def traffic_rows(history: History) -> list[TrafficRow]:
    """Measured beside predicted bytes a step, the largest first; none for a single worker."""
    predicted = predicted_traffic(history)
    measured = {name: _medians(steps) for name, steps in history.traffic.items()}
    names = [*measured, *(name for name in predicted if name not in measured)] if measured else []
    rows = []
    for name in sorted(names, key=lambda name: -measured.get(name, (0.0,))[0]):
        foretold = bytes_text(predicted[name]) if name in predicted else UNKNOWN
        if name not in measured:
            rows.append(TrafficRow(name, bytes_text(0), foretold, UNKNOWN, "0"))
            continue
        size, seconds, calls = measured[name]
        rows.append(
            TrafficRow(
                name,
                bytes_text(size),
                foretold,
                f"{significant(1e3 * seconds)} ms",
                f"{calls:,.0f}",
            )
        )
    return rows


def measured_traffic(history: History) -> float | None:
    """Bytes that the first worker sent in a step, over all dimensions; None where it is alone."""
    if not history.traffic:
        return None
    return sum(_medians(steps)[0] for steps in history.traffic.values())


def predicted_traffic(history: History) -> dict[str, float]:
    """Bytes a step that the closed formulas give for the run's model and plan.

    Empty where those are not known, as for a model that is not one of ours.
    """
    try:
        config = json.loads((history.directory / "model" / "config.json").read_text())
        return traffic_bytes(decoder_config(config), Plan.from_json(history.texts["plan.json"]))
    except (OSError, LookupError, TypeError, ValueError, UserError):
        return {}


def _medians(steps: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Bytes, seconds and calls of a step."""
    columns = [[step[key] for step in steps] for key in ("bytes", "seconds", "calls")]
    size, seconds, calls = (float(statistics.median(column)) for column in columns)
    return size, seconds, calls
