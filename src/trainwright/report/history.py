"""A run directory as the report sees it: columns of numbers, what happened, and what is missing.

Every file of it may be absent, as in a run that crashed early or was copied in part.
"""

from __future__ import annotations

import json
import math
import statistics
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.planner.plan_record import RECORD_FILE
from trainwright.report.records import METRICS_FILE, Record, iterate_metrics

COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_total",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
    "seconds",
)
LAST_STEPS = 20  # the final training loss is the mean over so many: one batch's loss is noise
FILES = {
    "recipe.yaml": "the recipe as given",
    "resolved.yaml": "the recipe with everything filled in",
    "plan.json": "how the work was spread",
    "environment.json": "the machine and the versions",
}


@dataclass
class History:
    """What is known of a run. Columns have one value a step record, NaN where it is not known."""

    directory: Path
    columns: dict[str, array] = field(default_factory=lambda: {key: array("d") for key in COLUMNS})
    evaluations: dict[tuple[str, int], Record] = field(default_factory=dict)  # by (name, step)
    tasks: dict[str, Record] = field(default_factory=dict)  # by name, the newest of each
    traffic: dict[str, list[Record]] = field(default_factory=dict)  # by dimension, a record a step
    samples: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)
    starts: list[Record] = field(default_factory=list)
    end: Record | None = None  # of the last process; None while it runs, or if it crashed
    skipped_steps: int = 0  # fp16: gradients overflowed, nothing changed
    broken_steps: list[int] = field(default_factory=list)  # loss on record as NaN or infinite
    first_time: float | None = None
    last_time: float | None = None
    seconds: float = 0.0  # that some process was at work on the run
    texts: dict[str, str] = field(default_factory=dict)  # of FILES, by name
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step on record, 0 before the first."""
        return int(max(self.columns["step"], default=0))

    @property
    def status(self) -> str:
        """`unfinished` without an end on record, else what that says, `finished` or `stopped`."""
        if self.end is None:
            return "unfinished"
        total = self.fact("total_steps")
        early = total is not None and self.steps < total
        return str(self.end.get("status") or ("stopped" if early else "finished"))

    @property
    def restarts(self) -> list[Record]:
        """The starts after the first that had steps left: it went on after a stop or a crash."""
        total = self.fact("total_steps")
        return [
            record for record in self.starts[1:] if total is None or record.get("step", 0) < total
        ]

    @property
    def validation_names(self) -> list[str]:
        """Names of the held-out sets, in the order first seen."""
        return list(dict.fromkeys(name for name, _ in self.evaluations))

    def evaluations_of(self, name: str) -> list[Record]:
        """One held-out set's evaluations by step; of two at the same step the later one."""
        chosen = [record for (of, _), record in self.evaluations.items() if of == name]
        return sorted(chosen, key=lambda record: record["step"])

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the run, empty if it is missing or broken."""
        try:
            value = json.loads(self.texts.get(name, "{}"))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def fact(self, key: str) -> Any:
        """What the records or the run's start say under `key`, the latest word first."""
        sources: list[Mapping[str, Any]] = [self.end or {}, *reversed(self.starts)]
        return next((source[key] for source in sources if source.get(key) is not None), None)


def read_history(run_directory: Path) -> History:
    """Read everything a report needs; UserError where a metrics line but the last is broken."""
    history = History(run_directory)
    for record in iterate_metrics(run_directory):
        _take(history, record)
    if not (run_directory / METRICS_FILE).is_file():
        history.missing.append(f"{METRICS_FILE} (the run's records)")
    for name, purpose in FILES.items():
        path = run_directory / name
        if path.is_file():
            history.texts[name] = path.read_text(errors="replace")
        else:
            history.missing.append(f"{name} ({purpose})")
    foretold = run_directory / RECORD_FILE
    if foretold.is_file():  # runs of older releases have none
        history.texts[RECORD_FILE] = foretold.read_text(errors="replace")
    return history


def _take(history: History, record: Record) -> None:
    """Add one record, which comes after those already taken."""
    kind, now = record.get("kind"), record.get("time")
    if now is not None:
        if history.first_time is None:
            history.first_time = now
        elif kind != "start" and history.last_time is not None:
            history.seconds += max(0.0, now - history.last_time)
        history.last_time = now
    if kind == "step":
        for key in COLUMNS:
            value = record.get(key)
            history.columns[key].append(math.nan if value is None else value)
        for dimension, moved in (record.get("traffic") or {}).items():
            history.traffic.setdefault(dimension, []).append(moved)
        history.skipped_steps += bool(record.get("skipped"))
        loss = record.get("loss")
        if loss is not None and not math.isfinite(loss):
            history.broken_steps.append(record["step"])
    elif kind == "evaluation":
        history.evaluations[record.get("name") or "validation", record["step"]] = record
    elif kind == "task":
        history.tasks[record["name"]] = record
    elif kind == "sample":
        history.samples.append(record)
    elif kind == "checkpoint":
        history.checkpoints.append(record)
    elif kind == "start":
        history.starts.append(record)
        history.end = None
    elif kind == "end":
        history.end = record


def finite(values: Iterable[float]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if math.isfinite(value)]


def median(values: array) -> float | None:
    """The median of what is known, None if nothing is."""
    known = finite(values)
    return statistics.median(known) if known else None


def final_loss(history: History) -> float | None:
    """Mean training loss of the last steps, None if none is finite."""
    known = finite(history.columns["loss"][-LAST_STEPS:])
    return statistics.fmean(known) if known else None
