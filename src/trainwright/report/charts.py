"""Which charts a run's report shows, from the columns of its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from trainwright.report.history import History, finite
from trainwright.report.plots import Line, Mark, line_chart, smooth
from trainwright.report.tables import bytes_text, duration_text, significant

WIDE, HALF = (1100, 340), (540, 250)  # width and height in pixels
LOG_RANGE = 30  # the y axis is logarithmic where the greatest value is so many times the least
SMOOTHED_FROM = 30  # with fewer steps a smoothed line would only repeat the raw one


class Chart(NamedTuple):
    """A drawing with its heading, and what its lines are: (class names, label)."""

    heading: str
    drawing: Markup
    legend: list[tuple[str, str]]
    wide: bool


def draw_charts(history: History) -> list[Chart]:
    """Every chart whose numbers are on record, loss first."""
    columns, steps = history.columns, history.columns["step"]
    memory = [value / 1e9 for value in columns["memory_bytes"]]
    charts = [
        _chart(
            "Loss",
            _smoothed(steps, columns["loss"], "training") + _validation_lines(history),
            marks=_events(history),
            y_title="loss (nats per token)",
            wide=True,
        ),
        _chart(
            "Learning rate",
            [Line("learning rate", steps, columns["learning_rate"])],
            y_title="learning rate",
            from_zero=True,
        ),
        _chart(
            "Gradient norm",
            _smoothed(steps, columns["gradient_norm"], "each step"),
            y_title="norm before clipping",
        ),
        _chart(
            "Throughput",
            _smoothed(steps, columns["tokens_per_second"], "each step"),
            y_title="tokens per second",
            from_zero=True,
            describe=lambda value: f"{value:,.0f}",
        ),
        _chart(
            "Memory",
            [Line("memory", steps, memory)],
            y_title="memory (GB)",
            from_zero=True,
            describe=lambda value: f"{significant(value)} GB",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(
    heading: str,
    lines: Sequence[Line],
    *,
    wide: bool = False,
    from_zero: bool = False,
    **options: Any,
) -> Chart | None:
    """The chart of `lines`, None where none of them has a value."""
    known = [line for line in lines if finite(line.ys)]
    if not known:
        return None
    values = [value for line in known for value in finite(line.ys) if value > 0]
    log = not from_zero and len(values) > 1 and max(values) > LOG_RANGE * min(values)
    width, height = WIDE if wide else HALF
    drawing = line_chart(
        known, x_title="step", width=width, height=height, log=log, from_zero=from_zero, **options
    )
    legend = [(line.class_names, line.label) for line in known]
    return Chart(heading, Markup(drawing), legend if len(legend) > 1 else [], wide)


def _smoothed(xs: Sequence[float], ys: Sequence[float], label: str) -> list[Line]:
    """The raw values, and over them their moving average where there are enough of them."""
    if len(ys) < SMOOTHED_FROM:
        return [Line(label, xs, ys)]
    average = smooth(ys, span=max(5.0, len(ys) / 50))
    return [Line(label, xs, ys, "raw"), Line("smoothed", xs, average)]


def _validation_lines(history: History) -> list[Line]:
    lines = []
    for series, name in enumerate(history.validation_names, start=1):
        records = history.evaluations_of(name)
        steps, losses = ([record[key] for record in records] for key in ("step", "loss"))
        lines.append(Line(name, steps, losses, "points", series))
    return lines


def _events(history: History) -> list[Mark]:
    """Checkpoints, restarts and broken losses, for the chart's axis."""
    marks = []
    for record in history.checkpoints:
        words = f"checkpoint at step {record['step']:,}"
        if record.get("bytes") is not None:
            words += f", {bytes_text(record['bytes'])}"
        if record.get("seconds_stalled") is not None:
            words += f", training paused {duration_text(record['seconds_stalled'])}"
        marks.append(Mark("checkpoint", record["step"], words))
    for record in history.restarts:
        step = record.get("step", 0)
        marks.append(Mark("restart", step, f"restarted from step {step:,}"))
    for step in history.broken_steps[:100]:
        marks.append(Mark("broken", step, f"loss is not a number at step {step:,}"))
    return marks
