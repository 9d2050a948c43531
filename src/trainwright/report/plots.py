"""Line charts as SVG text, made by hand so that a report needs no library and no script.

Colours and fonts come from the page's style sheet through class names, so that one drawing serves
the light and the dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from trainwright.report.tables import significant

LEFT, RIGHT, TOP, BOTTOM = 66, 16, 12, 42  # margins around the plotting area, in pixels
HOVER_STRIPS = 150  # places along the x axis that answer the mouse

COLOURS = 5  # that the style sheet has for series

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One series. `raw` is thin and pale, `smooth` is thick, `points` has a dot at each value.

    Lines with the same `series` number have the same colour.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: Literal["raw", "smooth", "points"] = "smooth"
    series: int = 0

    @property
    def class_names(self) -> str:
        """What the style sheet knows the line by."""
        return f"s{self.series % COLOURS} {self.style}"


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x`: a checkpoint, a restart, a value that is not a number."""

    kind: Literal["checkpoint", "restart", "broken"]
    x: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Where a value lies in pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    width: int = 540,
    height: int = 250,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
    describe: Callable[[float], str] = significant,
) -> str:
    """An SVG drawing of `lines` over a common x axis of whole numbers, such as steps.

    `log` makes the y axis logarithmic (values ≤ 0 are left out), `from_zero` lets it begin at 0.
    `describe` words a y value for the text that appears under the mouse. Long series keep the
    least and the greatest value of every pixel column, so that no spike is lost.
    Raises ValueError if no line has a finite value to draw.
    """
    drawn = [(line, *_drawable(line, log)) for line in lines]
    all_x = [x for _, xs, _ in drawn for x in xs if math.isfinite(x)]
    all_y = [y for _, _, ys in drawn for y in ys if math.isfinite(y)]
    if not all_y:
        raise ValueError("nothing to draw: no line has a finite value")
    x_low, x_high = min(all_x), max(all_x)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x_scale = Scale(x_low, x_high, LEFT, width - RIGHT)
    y_low, y_high, y_ticks = _axis(min(all_y), max(all_y), log=log, from_zero=from_zero)
    y_scale = Scale(y_low, y_high, height - BOTTOM, TOP, log)

    x_ticks = nice_ticks(x_low, x_high, 8 if width > 700 else 5, whole=True)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(y_title)} over {escape(x_title)}">'
    ]
    parts += _grid(x_ticks, y_ticks, x_scale, y_scale, width, height, log)
    parts += _titles(x_title, y_title, width, height)
    for line, xs, ys in drawn:
        parts += _draw_line(line, xs, ys, x_scale, y_scale)
    parts += _hover(drawn, x_scale, y_scale, height, x_title, describe)
    # Marks come last, over the strips that answer the mouse, or their own titles would not show.
    parts += [_mark(mark, x_scale, height) for mark in marks if x_low <= mark.x <= x_high]
    parts.append("</svg>")
    return "\n".join(parts)


def nice_ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """At most about `most` round numbers (1, 2, 2.5 or 5 × 10ⁿ apart) within [low, high].

    `whole` keeps them whole numbers, as steps are.
    """
    step = _nice_step((high - low) / most)
    if whole:
        step = max(1.0, 2.0 if step == 2.5 else step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with their 2 and 5 fold where few powers fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, math.ceil(len(powers) / 7))
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers[::stride] for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def tick_labels(ticks: Sequence[float], *, log: bool = False) -> list[str]:
    """The ticks in words, all with the same number of decimals: 0.5, 1.0, 1.5 or 10k, 20k."""
    if not ticks:
        return []
    largest = max(abs(tick) for tick in ticks)
    if log:
        return [_plain_number(tick) for tick in ticks]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else largest or 1.0
    if largest and largest < 1e-3:
        return [_plain_number(tick) for tick in ticks]
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size or (largest >= size and size >= 1e6):
            decimals = _decimals(step / size)
            return [f"{tick / size:.{decimals}f}{suffix}" if tick else "0" for tick in ticks]
    return [f"{tick:,.{_decimals(step)}f}" if tick else "0" for tick in ticks]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Mean of two exponential averages over about `span` values, one from either end.

    The one lags by as much as the other leads, so that a steep fall is not drawn too late. A value
    that is not finite gives NaN in its place and leaves the averages as they were.
    """
    forward = exponential_average(values, span)
    backward = exponential_average(values[::-1], span)[::-1]
    return [(first + second) / 2 for first, second in zip(forward, backward, strict=True)]


def exponential_average(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average, divided by its weight so that it has no bias at its start."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        if not math.isfinite(value):
            averages.append(math.nan)
            continue
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def thin_out(points: Sequence[Point], low: float, high: float, buckets: int) -> list[Point]:
    """At most four points a bucket of x: first, least, greatest and last y, in their order.

    `points` are sorted by x. A line drawn through what remains looks the same at `buckets` pixels.
    """
    if len(points) <= 4 * buckets:
        return list(points)
    kept: list[Point] = []
    bucket: list[Point] = []
    current = -1
    for point in points:
        index = min(int((point[0] - low) / (high - low) * buckets), buckets - 1)
        if index != current and bucket:
            kept += _extremes(bucket)
            bucket = []
        current = index
        bucket.append(point)
    return kept + _extremes(bucket)


def _extremes(bucket: list[Point]) -> list[Point]:
    positions = range(len(bucket))
    least = min(positions, key=lambda index: bucket[index][1])
    greatest = max(positions, key=lambda index: bucket[index][1])
    return [bucket[index] for index in sorted({0, least, greatest, len(bucket) - 1})]


def _drawable(line: Line, log: bool) -> tuple[list[float], list[float]]:
    """x and y of a line, y NaN where it cannot be drawn, so that the line breaks there."""
    ys = [y if math.isfinite(y) and (y > 0 or not log) else math.nan for y in line.ys]
    return list(line.xs), ys


def _axis(
    low: float, high: float, *, log: bool, from_zero: bool
) -> tuple[float, float, list[float]]:
    """Ends and ticks of the y axis for values between `low` and `high`."""
    if log:
        low, high = low * 0.9, high * 1.1
        return low, high, log_ticks(low, high)
    if from_zero:
        low, high = min(low, 0.0), high * 1.08 if high > 0 else 1.0
    elif low == high:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    else:
        room = 0.05 * (high - low)
        low, high = (max(low - room, 0.0) if low >= 0 else low - room), high + room
    return low, high, nice_ticks(low, high)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _decimals(step: float) -> int:
    """Decimals needed to tell apart multiples of `step`."""
    return next(
        (digits for digits in range(12) if abs(round(step, digits) - step) < step / 100), 12
    )


def _plain_number(value: float) -> str:
    """0.002, 50, or 2e-05 as 2e-5 where the digits would be many."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _grid(
    x_ticks: list[float],
    y_ticks: list[float],
    x_scale: Scale,
    y_scale: Scale,
    width: int,
    height: int,
    log: bool,
) -> list[str]:
    bottom = height - BOTTOM
    parts = []
    for tick, label in zip(y_ticks, tick_labels(y_ticks, log=log), strict=True):
        y = y_scale(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = x_scale(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    return parts


def _titles(x_title: str, y_title: str, width: int, height: int) -> list[str]:
    middle_x, middle_y = (LEFT + width - RIGHT) / 2, (TOP + height - BOTTOM) / 2
    return [
        f'<text class="title" x="{middle_x}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_title)}</text>",
        f'<text class="title" transform="translate(11 {middle_y}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>',
    ]


def _mark(mark: Mark, x_scale: Scale, height: int) -> str:
    x, bottom = x_scale(mark.x), height - BOTTOM
    title = f"<title>{escape(mark.label)}</title>"
    if mark.kind == "checkpoint":
        shape = f'<path d="M{x:.1f} {bottom - 8}l4.5 8h-9z"/>'
    elif mark.kind == "restart":
        shape = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
    else:
        shape = f'<path d="M{x - 4:.1f} {TOP}l8 8m0 -8l-8 8"/>'
    return f'<g class="mark {mark.kind}">{title}{shape}</g>'


def _draw_line(
    line: Line, xs: list[float], ys: list[float], x_scale: Scale, y_scale: Scale
) -> list[str]:
    parts = []
    columns = int(x_scale.end - x_scale.start)
    path = []
    for run in _unbroken(xs, ys):
        points = thin_out(run, x_scale.low, x_scale.high, columns)
        pixels = [f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in points]
        # A value between two gaps would be an empty line; a tiny one with round caps is a dot.
        path.append("M" + "L".join(pixels) if len(pixels) > 1 else f"M{pixels[0]}h.01")
    if path:
        parts.append(f'<path class="line {line.class_names}" d="{"".join(path)}"/>')
    if line.style == "points":
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                place = f'cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}"'
                parts.append(f'<circle class="dot {line.class_names}" {place} r="3"/>')
    return parts


def _unbroken(xs: list[float], ys: list[float]) -> list[list[Point]]:
    """The runs of a line between its gaps."""
    runs: list[list[Point]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _hover(
    drawn: list[tuple[Line, list[float], list[float]]],
    x_scale: Scale,
    y_scale: Scale,
    height: int,
    x_title: str,
    describe: Callable[[float], str],
) -> list[str]:
    """Invisible strips over the plot, each with a rule, a dot and the values at its place."""
    values: dict[int, list[tuple[float, float, str]]] = {}
    strip = (x_scale.end - x_scale.start) / HOVER_STRIPS
    for line, xs, ys in drawn:
        taken: set[int] = set()
        for x, y in zip(xs, ys, strict=True):
            index = min(int((x_scale(x) - x_scale.start) / strip), HOVER_STRIPS - 1)
            if math.isfinite(y) and index not in taken:
                taken.add(index)
                values.setdefault(index, []).append((x, y, line.label))
    parts = []
    places = sorted(values)
    for place, index in enumerate(places):
        # A strip reaches halfway to its neighbours, so that sparse points are easy to hit.
        left = (places[place - 1] + index + 1) / 2 if place else 0
        right = (index + 1 + places[place + 1]) / 2 if place + 1 < len(places) else HOVER_STRIPS
        x, y, _ = values[index][-1]
        words = [f"{x_title} {x:,.0f}"] + [
            f"{label} {describe(y)}" for _, y, label in values[index]
        ]
        parts.append(
            f'<g class="at"><title>{escape(chr(10).join(words))}</title>'
            f'<rect x="{x_scale.start + left * strip:.1f}" y="{TOP}" '
            f'width="{(right - left) * strip:.1f}" height="{height - BOTTOM - TOP}"/>'
            f'<path d="M{x_scale(x):.1f} {TOP}V{height - BOTTOM}"/>'
            f'<circle cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="3.5"/></g>'
        )
    return parts
