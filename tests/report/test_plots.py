"""Charts: round ticks, no spike lost, lines that break where nothing is known, valid SVG."""

from __future__ import annotations

import math
import random
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from trainwright.report.plots import (
    HOVER_STRIPS,
    Line,
    Mark,
    exponential_average,
    line_chart,
    log_ticks,
    nice_ticks,
    smooth,
    thin_out,
    tick_labels,
)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def draw(lines: list[Line], **options) -> ElementTree.Element:
    return parse(line_chart(lines, x_title="step", y_title="loss", **options))


def path_points(chart: ElementTree.Element, style: str) -> list[list[tuple[float, float]]]:
    """Pixels of each unbroken run of the line with this style."""
    (path,) = [node for node in chart.iter("path") if style in (node.get("class") or "").split()]
    runs = path.get("d").split("M")[1:]
    number = r"-?\d+\.?\d*"
    return [
        [(float(x), float(y)) for x, y in re.findall(rf"({number}) ({number})", run)]
        for run in runs
    ]


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_inside_and_evenly_apart(seed):
    chance = random.Random(seed)
    low = chance.uniform(-10, 10) * 10 ** chance.randint(-6, 6)
    high = low + abs(low) * chance.uniform(0.1, 10) * 10 ** chance.randint(-4, 6)
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-4
    assert len(set(tick_labels(ticks))) == len(ticks), "two ticks must not read the same"


def test_whole_ticks_for_steps():
    assert nice_ticks(1, 20, 8, whole=True) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert nice_ticks(1, 3, 8, whole=True) == [1, 2, 3]
    assert nice_ticks(0, 20_000, 8, whole=True)[1] == 2500


def test_tick_labels():
    assert tick_labels([0, 0.25, 0.5]) == ["0", "0.25", "0.50"]
    assert tick_labels([0, 5000, 10000]) == ["0", "5k", "10k"]
    assert tick_labels([0, 2.5e6, 5e6]) == ["0", "2.5M", "5.0M"]
    assert tick_labels([0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert tick_labels([0, 1000, 2000]) == ["0", "1,000", "2,000"]
    assert tick_labels(log_ticks(0.3, 30), log=True) == ["0.5", "1", "2", "5", "10", "20"]
    assert log_ticks(1e-9, 1e9)[0] >= 1e-9 and len(log_ticks(1e-9, 1e9)) <= 8


def test_thinning_keeps_every_buckets_extremes_and_ends():
    chance = random.Random(3)
    points = [(float(x), chance.gauss(0, 1)) for x in range(50_000)]
    points[31_415] = (31_415.0, 1e6)
    points[27_182] = (27_182.0, -1e6)
    kept = thin_out(points, 0, 49_999, 500)
    assert len(kept) <= 4 * 500 and kept == sorted(kept)
    assert set(kept) <= set(points) and {points[0], points[-1]} <= set(kept)
    ys, index = np.array([y for _, y in points]), np.arange(50_000)
    buckets = np.minimum((index / 49_999 * 500).astype(int), 499)
    kept_ys = {y for _, y in kept}
    for bucket in range(500):
        inside = ys[buckets == bucket]
        assert inside.min() in kept_ys and inside.max() in kept_ys


def test_smoothing_against_its_definition():
    values = np.random.default_rng(0).normal(size=40)
    keep = 1 - 2 / 11
    expected = [
        np.average(values[: n + 1], weights=keep ** np.arange(n, -1, -1.0)) for n in range(40)
    ]
    assert np.allclose(exponential_average(list(values), 10), expected)
    assert smooth([4.0] * 9, 5) == pytest.approx([4.0] * 9)
    line = [float(n) for n in range(200)]
    assert smooth(line, 9)[60:140] == pytest.approx(line[60:140], abs=1e-3), "no lag on a slope"
    gap = smooth([1.0, math.nan, 1.0], 5)
    assert math.isnan(gap[1]) and gap[2] == 1.0


def test_a_chart_is_valid_svg_whose_points_are_where_they_should_be():
    chart = draw([Line("loss", [0, 50, 100], [1.0, 3.0, 2.0])], width=500, height=300)
    assert chart.get("viewBox") == "0 0 500 300"
    ((left, middle, right),) = path_points(chart, "smooth")
    assert left[0] < middle[0] < right[0] and middle[0] == pytest.approx((left[0] + right[0]) / 2)
    assert middle[1] < right[1] < left[1], "greater values are higher up"
    assert right[1] == pytest.approx((left[1] + middle[1]) / 2, abs=0.1)
    words = [node.text for node in chart.iter("text")]
    assert "step" in words and "loss" in words and "100" in words


def test_from_zero_puts_zero_on_the_axis():
    chart = draw([Line("speed", [1, 2], [900.0, 1000.0])], from_zero=True, height=300)
    (axis,) = [node for node in chart.iter("line") if node.get("class") == "axis"]
    ((first, second),) = path_points(chart, "smooth")
    bottom = float(axis.get("y1"))
    assert (bottom - first[1]) / (bottom - second[1]) == pytest.approx(0.9, abs=0.01)


def test_a_log_axis_spaces_by_ratio_and_leaves_out_what_has_no_logarithm():
    chart = draw([Line("norm", [1, 2, 3, 4], [1.0, 10.0, 100.0, 0.0])], log=True)
    ((one, ten, hundred),) = path_points(chart, "smooth")
    assert one[1] - ten[1] == pytest.approx(ten[1] - hundred[1], abs=0.2)


def test_lines_break_where_a_value_is_not_known():
    nan = math.nan
    chart = draw([Line("loss", range(7), [1.0, 2.0, nan, 3.0, nan, 2.0, 1.0])])
    assert [len(run) for run in path_points(chart, "smooth")] == [2, 1, 2]


def test_a_spike_among_a_hundred_thousand_steps_is_drawn_and_the_drawing_stays_small():
    ys = [2.0] * 100_000
    ys[54_321] = 9.0
    svg = line_chart([Line("loss", range(100_000), ys, "raw")], x_title="step", y_title="loss")
    (run,) = path_points(parse(svg), "raw")
    heights = sorted({y for _, y in run})
    assert len(heights) == 2, "the spike's top and the floor"
    assert len(svg) < 100_000


def test_hover_titles_name_every_lines_value_and_reach_sparse_points():
    lines = [
        Line("training", range(1, 1001), [1 / n for n in range(1, 1001)], "raw"),
        Line("held-out", [500, 1000], [0.5, 0.25], "points", series=1),
    ]
    chart = draw(lines)
    places = [group for group in chart.iter("g") if group.get("class") == "at"]
    assert len(places) <= HOVER_STRIPS
    titles = [place.find("title").text for place in places]
    assert any("held-out 0.500" in title and "training 0.00" in title for title in titles)
    widths = [float(place.find("rect").get("width")) for place in places]
    lefts = [float(place.find("rect").get("x")) for place in places]
    for left, width, following in zip(lefts, widths, lefts[1:], strict=False):
        assert left + width == pytest.approx(following, abs=0.25), "no gap between strips"
    sparse = draw([Line("held-out", [0, 10], [1.0, 2.0], "points")])
    wide = [float(node.find("rect").get("width")) for node in sparse.iter("g") if node.get("class")]
    assert min(wide) > 200, "two points share the whole plot between them"


def test_marks_and_labels_are_escaped_and_outsiders_left_out():
    marks = [Mark("checkpoint", 1, "<b>&"), Mark("restart", 2, "r"), Mark("broken", 99, "far")]
    chart = draw([Line("a<b", [1, 2, 3], [1.0, 2.0, 3.0])], marks=marks)
    groups = [node for node in chart.iter("g") if "mark" in (node.get("class") or "")]
    assert [node.find("title").text for node in groups] == ["<b>&", "r"]


@pytest.mark.parametrize("ys", [[5.0], [0.0], [-2.0]])
def test_a_single_value_can_be_drawn(ys):
    assert draw([Line("loss", [7], ys)]) is not None
    assert draw([Line("loss", [7], ys)], from_zero=True) is not None


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([Line("loss", [1, 2], [math.nan, math.inf])])
