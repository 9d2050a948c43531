"""What a run shows while it trains: a live display in a terminal, few plain lines elsewhere.

The step path only takes numbers; a thread of rich's draws them four times a second.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainwright.report.records import SCORES
from trainwright.report.tables import bytes_text, duration_text, percent_text, significant

Record = dict[str, Any]

SMOOTHING = 0.9  # weight of the past in the smoothed loss
SPARK_CELLS = 24
BLOCKS = "▁▂▃▄▅▆▇█"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
QUIET_SECONDS = 10.0  # least time between plain lines
QUIET_SHARE = 0.1  # least share of the run between plain lines


@dataclass
class Standing:
    """Where the run stands: all that is shown, and nothing that takes time to keep."""

    total: int = 0
    done: int = 0
    resumed_from: int = 0
    last: Record | None = None
    tokens: int = 0  # of this process
    step_seconds: float = 0.0  # spent in its steps
    first_step_at: float | None = None
    first_step: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    curve: tuple[float, ...] = ()
    curve_every: int = 1
    verbose: bool = False  # show what each dimension of parallelism sent, too

    def take(self, record: Record, now: float) -> None:
        """Add a step's record; `now` is in seconds, of any clock that runs evenly."""
        self.done, self.last = record["step"], record
        self.tokens += record.get("tokens") or 0
        self.step_seconds += record.get("seconds") or 0.0
        if self.first_step_at is None:
            self.first_step_at, self.first_step = now, self.done
        loss = record["loss"]
        if loss - loss == 0:  # finite
            self.loss_sum = SMOOTHING * self.loss_sum + (1 - SMOOTHING) * loss
            self.loss_weight = SMOOTHING * self.loss_weight + (1 - SMOOTHING)
        if self.loss_weight and self.done % self.curve_every == 0:
            self.curve += (self.loss_sum / self.loss_weight,)
            if len(self.curve) > 2 * SPARK_CELLS:  # a longer run: every other point will do
                self.curve, self.curve_every = self.curve[1::2], 2 * self.curve_every

    @property
    def loss(self) -> float | None:
        """The smoothed loss, None before the first finite one."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None

    def seconds_left(self, now: float) -> float | None:
        """At the pace so far, pauses included but not the first step, which may compile."""
        if self.last is None or self.first_step_at is None:
            return None
        since = self.done - self.first_step
        pace = (now - self.first_step_at) / since if since else self.last.get("seconds")
        return None if pace is None else pace * (self.total - self.done)


class Progress:
    """Shows a run's progress on `console` (default: standard output).

    Call `start` once, `step` after every step, and `finish` at the end; `say`, `evaluation` and
    `sample` print above the live display.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console()
        self.clock = clock
        self.standing = Standing()
        self.live: Live | None = None
        self.last_line_at = -QUIET_SECONDS
        self.last_line_step = 0

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal to redraw on."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def start(self, total_steps: int, done_steps: int = 0) -> None:
        """Begin at `done_steps` of `total_steps`."""
        self.standing = Standing(total=total_steps, done=done_steps, resumed_from=done_steps)
        if done_steps:
            self.say(f"going on from step {done_steps:,}")
        if self.is_live:
            # Standard error stays what it is: a worker's goes to its log.
            self.live = Live(
                Display(self.standing, self.clock),
                console=self.console,
                refresh_per_second=4,
                redirect_stderr=False,
            )
            self.live.start()
            # rich hides the cursor, and a killed worker could not bring it back.
            self.console.show_cursor(True)

    def step(self, record: Record) -> None:
        """Take up a step's record (`report.records` says what is in it)."""
        now = self.clock()
        first = self.standing.last is None
        self.standing.take(record, now)
        if self.live is not None:
            return
        due = now - self.last_line_at >= QUIET_SECONDS and (
            self.standing.done - self.last_line_step >= QUIET_SHARE * self.standing.total
        )
        if first or due or self.standing.done >= self.standing.total:
            self.last_line_at, self.last_line_step = now, self.standing.done
            self._print(plain_line(self.standing, now))

    def say(self, message: str) -> None:
        """Print a line above the display."""
        self._print(message)

    def evaluation(self, record: Record) -> None:
        """Print a held-out result."""
        text = Text.assemble(
            (f"step {record['step']:,}", "dim"),
            f"  {record.get('name') or 'validation'} loss ",
            (f"{significant(record['loss'], 4)}", "bold"),
        )
        if record.get("bits_per_byte") is not None:
            text.append("  bits per byte ")
            text.append(significant(record["bits_per_byte"], 4), "bold")
        if record.get("rewards/accuracies") is not None:
            text.append("  preferred ")
            text.append(percent_text(record["rewards/accuracies"]), "bold")
            text.append(f"  margin {significant(record['rewards/margins'])}")
        self._print(text)

    def task(self, record: Record) -> None:
        """Print what came of a task."""
        text = Text.assemble((f"step {record['step']:,}", "dim"), f"  {record['name']}")
        for name, error in [(key, record[f"{key}_stderr"]) for key in SCORES if key in record]:
            text.append(f"  {name} ")
            text.append(percent_text(record[name]), "bold")
            text.append("" if error is None else f" ± {percent_text(error)}")
        text.append(f"  of {record['rows']:,}")
        self._print(text)

    def sample(self, record: Record) -> None:
        """Print a prompt and its completion, behind a bar on the left."""
        text = Text.assemble((printable(record["prompt"]), "bold"), printable(record["completion"]))
        text.rstrip()
        self._print(Text(f"step {record['step']:,}  sample", "dim"))
        for line in text.split("\n", allow_blank=True):
            self._print(Text.assemble(("  │ ", "dim"), line))

    def finish(self, summary: Record | None = None) -> None:
        """End the display with one line on the whole run; `summary` may hold `step`, `seconds`."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        summary = summary or {}
        standing = self.standing
        steps = summary.get("step", standing.done) - standing.resumed_from
        parts = [f"{steps:,} steps"]
        if summary.get("seconds") is not None:
            parts[0] += f" in {duration_text(summary['seconds'])}"
        if standing.step_seconds:
            parts.append(f"{standing.tokens / standing.step_seconds:,.0f} tokens/s")
        if standing.done < standing.total:
            parts.append(f"stopped at step {standing.done:,} of {standing.total:,}")
        self._print("  ".join(parts))

    def _print(self, line: str | Text) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=not self.is_live)


@dataclass
class Display:
    """The live display: a bar with the time left, and below it the numbers that fit."""

    standing: Standing
    clock: Callable[[], float]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        standing = self.standing
        left = standing.seconds_left(self.clock())
        share = standing.done / max(standing.total, 1)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_row(
            f"step {standing.done:,}/{standing.total:,}",
            ProgressBar(standing.total, standing.done),
            f"{100 * share:.0f}%" + (f"  {duration_text(left)} left" if left else ""),
        )
        yield line
        yield fit(numbers(standing), options.max_width)
        if standing.verbose and standing.last is not None:
            yield fit(traffic(standing.last) or [Text("no traffic", "dim")], options.max_width)


def numbers(standing: Standing) -> list[Text]:
    """The numbers of the last step, the most important first; what is not known is left out."""
    record = standing.last
    if record is None:
        return [Text("waiting for the first step", "dim")]
    loss = Text("loss ")
    loss.append("–" if standing.loss is None else significant(standing.loss, 4), "bold")
    pieces = [loss]
    if record.get("tokens_per_second") is not None:
        pieces.append(Text(f"{record['tokens_per_second']:,.0f} tokens/s"))
    if record.get("mfu") is not None:
        pieces.append(Text(f"MFU {percent_text(record['mfu'])}"))
    if record.get("memory_bytes") is not None:
        pieces.append(Text(bytes_text(record["memory_bytes"])))
    if len(standing.curve) > 2:
        pieces.append(Text(sparkline(standing.curve), "cyan"))
    pieces.append(Text(f"last {significant(record['loss'], 4)}", "dim"))
    if record.get("gradient_norm") is not None:
        pieces.append(Text(f"grad {significant(record['gradient_norm'])}", "dim"))
    if record.get("learning_rate") is not None:
        pieces.append(Text(f"lr {significant(record['learning_rate'])}", "dim"))
    return pieces


def traffic(record: Record) -> list[Text]:
    """What each dimension of parallelism sent in the step, and how long it took."""
    return [
        Text(f"{name} {bytes_text(moved['bytes'])} {1e3 * moved['seconds']:.0f} ms", "dim")
        for name, moved in (record.get("traffic") or {}).items()
    ]


def fit(pieces: list[Text], width: int) -> Text:
    """As many of the first pieces as `width` cells hold, two blanks between them; at least one."""
    line = pieces[0].copy()
    for piece in pieces[1:]:
        if line.cell_len + 2 + piece.cell_len > width:
            break
        line = Text.assemble(line, "  ", piece)
    line.truncate(width)
    return line


def sparkline(values: tuple[float, ...]) -> str:
    """A curve in one line of text, at most `SPARK_CELLS` wide: each cell the mean of its values."""
    cells = min(len(values), SPARK_CELLS)
    edges = [len(values) * cell // cells for cell in range(cells + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    height = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * height)] for mean in means)


def printable(text: str) -> str:
    """`text` without control characters: a model may write some that would upset a terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def plain_line(standing: Standing, now: float) -> str:
    """The display as one line without colours, for logs."""
    left = standing.seconds_left(now)
    pieces = [f"step {standing.done:,}/{standing.total:,}"]
    pieces += [piece.plain for piece in numbers(standing) if not set(piece.plain) & set(BLOCKS)]
    if standing.verbose and standing.last is not None:
        pieces += [piece.plain for piece in traffic(standing.last)]
    if left:
        pieces.append(f"{duration_text(left)} left")
    return "  ".join(pieces)
