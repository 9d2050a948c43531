"""What a run shows: rare plain lines in logs, a display that fits the terminal, no surprises."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from trainwright.training.progress import (
    BLOCKS,
    SPARK_CELLS,
    Display,
    Progress,
    Standing,
    fit,
    numbers,
    plain_line,
    printable,
    sparkline,
)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float = 2.0, **changes) -> dict:
    record = {
        "kind": "step",
        "step": number,
        "loss": loss,
        "learning_rate": 3e-3,
        "gradient_norm": 1.25,
        "tokens": 4096,
        "seconds": 0.5,
        "tokens_per_second": 8192.0,
        "mfu": None,
        "memory_bytes": 1.18e9,
    }
    return {**record, **changes}


def plain_progress() -> tuple[Progress, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    return Progress(Console(file=out, width=60, force_terminal=False), clock), clock, out


def steps_shown(out: io.StringIO) -> list[int]:
    return [int(found) for found in re.findall(r"^step (\d+)/", out.getvalue(), re.MULTILINE)]


@pytest.mark.parametrize(
    ("seconds_a_step", "shown"),
    [
        (0.01, [1, 100]),  # a second in all: first and last
        (1.0, [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]),  # a tenth of the run takes 10 s
        (60.0, [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]),  # slow steps: still only each tenth
        (0.5, [1, 21, 41, 61, 81, 100]),  # a tenth takes 5 s: each 10 s
    ],
)
def test_plain_lines_are_rare(seconds_a_step, shown):
    progress, clock, out = plain_progress()
    progress.start(100)
    for number in range(1, 101):
        clock.now += seconds_a_step
        progress.step(step(number))
    assert steps_shown(out) == shown


def test_a_plain_line_is_one_line_without_colours_however_narrow():
    progress, clock, out = plain_progress()
    progress.start(100)
    clock.now += 1
    progress.step(step(1, mfu=0.412))
    (line,) = out.getvalue().splitlines()
    assert "\x1b" not in line and not set(line) & set(BLOCKS)
    for part in (
        "step 1/100",
        "loss 2.000",
        "8,192 tokens/s",
        "MFU 41.2%",
        "1.18 GB",
        "lr 0.00300",
    ):
        assert part in line
    assert line.endswith("50 s left"), "with one step known, its own seconds tell the rest"


def test_what_is_not_known_is_left_out():
    standing = Standing(total=10)
    standing.take(step(1, memory_bytes=None, gradient_norm=None), 0.0)
    line = plain_line(standing, 0.0)
    assert "MFU" not in line and "GB" not in line and "grad" not in line and "None" not in line


def test_time_left_counts_pauses_but_not_the_first_step():
    standing = Standing(total=101)
    standing.take(step(1, seconds=90.0), 500.0)  # compiled
    for number in range(2, 12):
        standing.take(step(number), 500.0 + 2.0 * (number - 1))  # 0.5 s of work, 1.5 s of saving
    assert standing.seconds_left(520.0) == pytest.approx(2.0 * 90)
    resumed = Standing(total=100, done=50)
    resumed.take(step(51), 0.0)
    resumed.take(step(52), 3.0)
    assert resumed.seconds_left(3.0) == pytest.approx(3.0 * 48)


def test_smoothed_loss_is_unbiased_and_survives_a_broken_one():
    standing = Standing(total=10)
    assert standing.loss is None
    for number, loss in enumerate([3.0, 3.0, math.nan, math.inf, 3.0], start=1):
        standing.take(step(number, loss), 0.0)
    assert standing.loss == pytest.approx(3.0)
    assert "last 3.000" in plain_line(standing, 0.0)
    standing.take(step(6, math.nan), 0.0)
    assert "last NaN" in plain_line(standing, 0.0)


def test_the_curve_of_a_long_run_stays_small_and_keeps_its_shape():
    standing = Standing(total=100_000)
    for number in range(1, 100_001):
        standing.take(step(number, 10 - number / 20_000), 0.0)
    assert SPARK_CELLS < len(standing.curve) <= 2 * SPARK_CELLS
    drawn = sparkline(standing.curve)
    assert len(drawn) == SPARK_CELLS
    assert list(drawn) == sorted(drawn, reverse=True) and drawn[0] == "█" and drawn[-1] == "▁"
    assert sparkline((1.0, 1.0, 1.0)) == "▁▁▁"


def test_numbers_fit_the_width_the_most_important_first():
    standing = Standing(total=10)
    for number in range(1, 5):
        standing.take(step(number, 5.0 - number, mfu=0.4), 0.0)
    pieces = numbers(standing)
    whole = fit(pieces, 200).plain
    for width in range(8, 120):
        line = fit(pieces, width)
        assert line.cell_len <= width and whole.startswith(line.plain)
    assert fit(pieces, 30).plain.startswith("loss ")


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_the_display_is_two_lines_at_any_width(width):
    standing = Standing(total=450)
    for number in range(1, 200):
        standing.take(step(number, 5.0), number * 0.5)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(Display(standing, lambda: 100.0))
    lines = out.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 2 and all(len(line) <= width for line in lines)
    if width >= 40:
        assert "199/450" in lines[0] and "44%" in lines[0] and "2 min 6 s left" in lines[0]


def test_a_terminal_gets_a_live_display_below_what_is_said():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None, _environ={})
    progress = Progress(console, Clock())
    progress.start(2, 0)
    progress.step(step(1))
    progress.say("saved [bold]as is[/bold]")
    progress.evaluation(
        {"step": 1, "name": "held-out", "loss": 2.51234, "bits_per_byte": 1.72123, "tokens": 9}
    )
    progress.step(step(2))
    progress.finish({"step": 2, "seconds": 151.0})
    text = out.getvalue()
    assert "saved [bold]as is[/bold]" in text, "nobody's text is markup"
    assert "held-out loss 2.512  bits per byte 1.721" in text
    assert "step 2/2" in text and "2 steps in 2 min 31 s  8,192 tokens/s" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"
    assert text.index("\x1b[?25h") < text.index("saved"), "and was never away for long"


def test_samples_are_shown_without_what_would_upset_a_terminal():
    progress, _, out = plain_progress()
    sample = {"step": 4, "prompt": "def f", "completion": "(x):\n\treturn \x1b[31m\x9b2J[red]x\n\n"}
    progress.sample(sample)
    assert out.getvalue().splitlines() == [
        "step 4  sample",
        "  │ def f(x):",
        "  │     return �[31m�2J[red]x",
    ]
    assert printable("tab\tline\nünï 漢") == "tab\tline\nünï 漢"


def test_a_resumed_and_stopped_run_says_so():
    progress, clock, out = plain_progress()
    progress.start(100, 40)
    for number in range(41, 61):
        clock.now += 0.1
        progress.step(step(number))
    progress.finish({"step": 60, "seconds": 12.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "going on from step 40"
    assert lines[-1] == "20 steps in 12 s  8,192 tokens/s  stopped at step 60 of 100"


def test_a_run_with_nothing_left_to_do_finishes_too():
    progress, _, out = plain_progress()
    progress.start(10, 10)
    progress.finish({"step": 10, "seconds": 0.1})
    assert out.getvalue().splitlines()[-1] == "0 steps in 0.1 s"


def test_traffic_is_shown_only_where_it_was_asked_for():
    moved = {"tp": {"bytes": 1.5e6, "seconds": 0.0304, "calls": 8}}
    progress, _, out = plain_progress()
    progress.start(10)
    progress.step(step(1, traffic=moved))
    assert "tp" not in out.getvalue()
    progress, _, out = plain_progress()
    progress.start(10)
    progress.standing.verbose = True
    progress.step(step(1, traffic=moved))
    assert "tp 1.50 MB 30 ms" in out.getvalue()
