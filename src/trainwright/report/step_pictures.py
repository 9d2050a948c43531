"""A predicted step drawn: what each pipeline rank does when, and what its memory holds."""

from __future__ import annotations

from collections import defaultdict
from html import escape
from importlib import resources

from trainwright.planner.cost.prediction import Prediction
from trainwright.planner.plan_record import PlanRecord
from trainwright.planner.step_slices import COMPUTE, OPTIMIZER, Slice, step_slices
from trainwright.report.plots import LEFT, RIGHT, Line, Scale, line_chart, nice_ticks, tick_labels
from trainwright.report.tables import significant

_WIDTH = 1100
_AXIS = 40  # pixels below the rows
_NUMBER = 13  # pixels that a micro-batch's number needs
_MOST_LINES = 5  # of memory: more would hide one another

# Kinds of slices as the style sheet knows them, in the legend's order.
_KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "sends": "communication",
    "updates": "optimizer",
}

Legend = list[tuple[str, str]]  # class names and label


def timeline_picture(prediction: Prediction) -> tuple[str, Legend]:
    """An SVG drawing with a row for each pipeline rank, and what its colours mean."""
    ranks = step_slices(prediction)
    row = min(30, max(5, 420 // len(ranks)))  # pixels
    bottom, factor, unit = row * len(ranks) + 4, *_unit(prediction.step_seconds.value)
    end = factor * prediction.step_seconds.value
    scale = Scale(0.0, end, LEFT, _WIDTH - RIGHT)
    label = f"what each pipeline rank does over {significant(end)} {unit}"
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {bottom + _AXIS}" role="img" '
        f'aria-label="{escape(label)}">'
    ]
    present: set[str] = set()
    numbers: list[str] = []  # of micro-batches, over all boxes
    for rank, slices in enumerate(ranks):
        middle = 4 + (rank + 0.5) * row
        if row >= 12 or rank % (12 // row + 1) == 0:
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{middle + 4:.1f}" '
                f'text-anchor="end">rank {rank}</text>'
            )
        boxes: dict[str, list[str]] = defaultdict(list)
        for each in slices:
            left, right = scale(factor * each.start), scale(factor * each.end)
            gap = 0.4 if right - left > 2 else 0.0
            boxes[_kind(each)].append(f"M{left:.1f} {middle:g}H{right - gap:.1f}")
            if row >= 18 and each.track == COMPUTE and right - left >= _NUMBER:
                numbers.append(
                    f'<text class="number" x="{(left + right) / 2:.1f}" y="{middle + 3:.1f}"'
                    f' text-anchor="middle">{each.micro_batch}</text>'
                )
        # A kind's boxes are one path, of thick lines: a long step has tens of thousands.
        parts += (
            f'<path class="slice {kind}" stroke-width="{row - 2}" d="{"".join(lines)}"/>'
            for kind, lines in boxes.items()
        )
        present |= boxes.keys()
    parts += [*numbers, *_time_axis(scale, end, bottom, unit)]
    return "\n".join([*parts, "</svg>"]), [(k, word) for k, word in _KINDS.items() if k in present]


def memory_picture(record: PlanRecord) -> tuple[str, Legend]:
    """An SVG drawing of the bytes on a device of each pipeline rank, or of some of many."""
    assert record.prediction is not None
    factor, unit = _unit(record.prediction.step_seconds.value)
    end = factor * record.prediction.step_seconds.value
    chosen = sorted(range(len(record.memory)), key=lambda rank: -_peak(record, rank))
    lines = []
    for series, rank in enumerate(sorted(chosen[:_MOST_LINES])):
        xs = [factor * time for time, _ in record.memory[rank]]
        ys = [size / 1e9 for _, size in record.memory[rank]]
        name = f"rank {rank}" if len(record.memory) > 1 else "each worker"
        lines.append(Line(name, [*xs, end], [*ys, ys[-1]], series=series))
    limit = record.prediction.memory.limit
    if 0 < limit < 2 * _peak(record, chosen[0]):
        lines.append(Line("limit", [0.0, end], [limit / 1e9] * 2, "raw"))
    drawing = line_chart(
        lines,
        x_title=f"{unit} of a step",
        y_title="memory (GB)",
        width=_WIDTH,
        height=280,
        from_zero=True,
        describe=lambda value: f"{significant(value)} GB",
    )
    return drawing, [(line.class_names, line.label) for line in lines]


def step_svg(record: PlanRecord) -> str:
    """Both pictures one above the other, as an SVG file that needs nothing else."""
    assert record.prediction is not None
    top, parts = 0, []
    for title, (drawing, legend) in (
        ("a step", timeline_picture(record.prediction)),
        ("memory", memory_picture(record)),
    ):
        opening, _, inner = drawing.partition(">")
        height = int(float(opening.split('viewBox="')[1].split('"')[0].split()[3]))
        parts.append(_heading(title, legend, top + 22))
        inner = inner.removesuffix("</svg>")
        parts.append(f'<g class="chart" transform="translate(0 {top + 36})">{inner}</g>')
        top += 36 + height + 12
    size = f'width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}"'
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    background = '<rect width="100%" height="100%" style="fill: var(--card)"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    return "\n".join([head, f"<style>{style}</style>", background, *parts, "</svg>\n"])


def _heading(title: str, legend: Legend, y: int) -> str:
    """A picture's name, and what its colours mean, in a row."""
    parts = [f'<text x="{LEFT}" y="{y}" style="fill: var(--text)">{escape(title)}</text>']
    x = LEFT + 110
    for names, label in legend:
        parts.append(f'<path class="slice line {names}" d="M{x} {y - 4}h18" stroke-width="8"/>')
        parts.append(f'<text class="tick" x="{x + 24}" y="{y}">{escape(label)}</text>')
        x += 44 + 7 * len(label)
    return f'<g class="chart">{"".join(parts)}</g>'


def _peak(record: PlanRecord, rank: int) -> float:
    return max(size for _, size in record.memory[rank])


def _kind(each: Slice) -> str:
    if each.track == COMPUTE:
        return each.name
    return "updates" if each.track == OPTIMIZER else "sends"


def _unit(seconds: float) -> tuple[float, str]:
    """What to multiply seconds by so that a step has whole numbers of the unit on its axis."""
    if seconds >= 20:
        return 1.0, "seconds"
    return (1e3, "milliseconds") if seconds >= 0.02 else (1e6, "microseconds")


def _time_axis(scale: Scale, end: float, bottom: int, unit: str) -> list[str]:
    ticks = nice_ticks(0.0, end, 8, whole=True)
    parts = [f'<line class="axis" x1="{LEFT}" x2="{_WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(
            f'<text class="tick" x="{scale(tick):.1f}" y="{bottom + 16}" '
            f'text-anchor="middle">{label}</text>'
        )
    middle = (LEFT + _WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="title" x="{middle}" y="{bottom + 34}" text-anchor="middle">'
        f"{unit} of a step</text>"
    )
    return parts
