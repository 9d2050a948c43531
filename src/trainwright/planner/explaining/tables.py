"""Plans in lines of at most 100 columns: ranked, explained, compared. No torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from trainwright.planner.cost.prediction import Interval, MemoryPrediction, Prediction
from trainwright.planner.explaining.question import Question
from trainwright.planner.explaining.ways import Way
from trainwright.planner.explaining.what_if import WhatIf
from trainwright.planner.explaining.why import NOISE, Named, differences, step_terms
from trainwright.planner.plan_words import in_words
from trainwright.planner.search.ranking import Ranked, Ranking

WIDTH = 100
_BAR = 40
_GIB = 1 << 30
# Only what is at least this share of a step is worth a word.
_TELLING = 0.01


def header(question: Question) -> list[str]:
    """What is planned, for which machine, by what."""
    job, cluster = question.job, question.clusters[0]
    pools = " + ".join(f"{pool.devices:,} × {pool.device.name}" for pool in cluster.pools)
    aims = ", ".join(
        name if len(question.objective.weights) == 1 else f"{name} × {weight:g}"
        for name, weight in question.objective.weights.items()
    )
    return [
        f"{question.recipe.name} on {cluster.name}: {pools}",
        f"a step is {job.batch_sequences:,} rows of {job.sequence_length:,} tokens; "
        f"the best plan by {aims}",
    ]


def ranking_lines(ranking: Ranking, aims: Sequence[str] = ("time",)) -> list[str]:
    """The best plans: time with its interval, speed, memory, traffic that shows, cost."""
    best = [ranked.prediction for ranked in ranking.best]
    prices, carbon = any(p.dollars for p in best), "carbon" in aims
    titles = ["", "step", "tokens/s", "MFU", "fullest device", "exposed", "idle", "J/token"]
    titles += ["$/M tokens"] * prices + ["kg CO2/M"] * carbon
    rows = [_row(place, p, prices, carbon) for place, p in enumerate(best, 1)]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [_joined(titles, widths)]
    for row, ranked in zip(rows, ranking.best, strict=True):
        lines.append(_joined(row, widths))
        words = plan_words(ranked)
        indent = " " * (widths[0] + 2)
        lines += textwrap.wrap(words, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
    return lines


def plan_words(ranked: Ranked) -> str:
    """A plan in words, and its devices where it leaves some or has them of several kinds."""
    plan, left, used = ranked.plan, ranked.plan.world_size, []
    for pool in ranked.cluster.pools:
        count = min(left, pool.devices)
        used += [f"{count:,} × {pool.device.name}"] * (count > 0)
        left -= count
    return f"{in_words(plan)}, micro-batch {plan.micro_batch}, on {' + '.join(used)}"


def _row(place: int, p: Prediction, prices: bool, carbon: bool) -> list[str]:
    """Cells of a prediction."""
    per_million = 1e6 / p.plan.batch_tokens
    cells = [
        f"{place}.",
        interval(p.step_seconds),
        count(p.tokens_per_second),
        f"{p.mfu:.0%}",
        memory_cell(p.memory),
        exposed_cell(p),
        f"{p.bubble:.0%}",
        f"{p.joules_per_token:.3g}",
    ]
    cells += [f"{p.dollars * per_million:.3g}"] * prices
    return cells + [f"{p.grams * per_million / 1000:.3g}"] * carbon


def exposed_cell(p: Prediction) -> str:
    """The dimensions whose traffic shows most, with their shares of the step."""
    shares = {name: seconds / p.step_seconds.value for name, seconds in p.exposed.items()}
    most = sorted(shares.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {share:.0%}" for name, share in most if share >= _TELLING / 2) or "–"


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def step_parts(prediction: Prediction) -> list[list[str]]:
    """Where the step's time goes, and what the fullest device holds, as bars."""
    total, memory = prediction.step_seconds.value, prediction.memory
    terms = {name: seconds for name, seconds in step_terms(prediction).items() if seconds > 0}
    rank = f" (pipeline rank {memory.pp_rank})" if prediction.plan.pp > 1 else ""
    held = {name: size for name, size in memory.lines.items() if size > 0}
    rest = memory.total.value - sum(held.values())
    if rest > _TELLING * memory.total.value:
        held["the allocator's holes"] = rest
    return [
        ["Where its step goes:", *_bars(terms, total, seconds_text)],
        [
            f"What its fullest device holds{rank}, of {memory.limit / _GIB:.1f} GiB:",
            *_bars(held, memory.limit, lambda size: f"{size / _GIB:.2f} GiB"),
        ],
    ]


def _bars(parts: Mapping[str, float], whole: float, text: Any) -> list[str]:
    shown = sorted(parts.items(), key=lambda item: -item[1])
    width = max((len(name) for name, _ in shown), default=0)
    texts = [text(value) for _, value in shown]
    wide = max(map(len, texts), default=0)
    lines = []
    for (name, value), told in zip(shown, texts, strict=True):
        bar = "█" * min(_BAR, round(_BAR * value / whole))
        lines.append(f"  {name:<{width}}  {told:>{wide}}  {value / whole:>4.0%}  {bar}".rstrip())
    return lines


def runner_up_lines(ranking: Ranking, aims: Sequence[str] = ("time",)) -> list[str]:
    """Why the second plan is not the first; nothing where there is none."""
    if len(ranking.best) < 2:
        return []
    return _wrapped(f"Why not the second: {_lost(ranking.best[0], ranking.best[1], aims)}")


_LOST: dict[tuple[str, ...], str] = {
    ("time",): "it takes {} times as long",
    ("cost",): "it costs {} times as much",
    ("energy",): "it takes {} times the energy",
    ("carbon",): "it emits {} times as much CO2",
}


def _lost(best: Ranked, other: Ranked, aims: Sequence[str]) -> str:
    """What `other` loses to `best`, and by which terms of the step."""
    one, two = best.prediction, other.prediction
    ratio = other.score / best.score
    text = _LOST.get(tuple(aims), "by the objective it is {} times the best").format(f"{ratio:.2f}")
    if ratio < 1 + NOISE:
        text = "it is as good as predictions can tell, and less simple"
        text = text if ratio >= 1 else "it is a little better by prediction, and less simple"
    least = _TELLING / 2 * one.step_seconds.value
    told = [each for each in differences(one, two) if abs(each.seconds) >= least][:3]
    if told:
        gains = [f"{seconds_text(-e.seconds)} less of {e.term}" for e in told if e.seconds < 0]
        losses = [f"{seconds_text(e.seconds)} more of {e.term}" for e in told if e.seconds > 0]
        text += f"; a step has {_and([*losses, *gains])}"
    return f"{text}."


def named_lines(named: Named, ranking: Ranking, aims: Sequence[str] = ("time",)) -> list[str]:
    """Where the recipe's own plan stands, or why it does not fit and what would make it."""
    words = _keys(named.layout)
    if named.ranked is not None:
        return _standing(named.ranked, named.position, ranking, words, aims)
    lines = _wrapped(f"Your plan ({words}) does not fit.")
    if named.nearest is not None:
        memory = named.nearest.prediction.memory
        lines += _wrapped(
            f"  Its nearest form is {in_words(named.nearest.plan)}: {too_full(memory)}"
        )
    if not named.mends:
        return [*lines, "  No change of one or two of its keys makes it fit."]
    lines.append("  The smallest changes that make it fit:")
    for mend in named.mends:
        p = mend.ranked.prediction
        lines += _wrapped(
            f"    {_keys(mend.changes)}: {interval(p.step_seconds)} a step, "
            f"{memory_words(p.memory)}",
            6,
        )
    return lines


def _standing(
    own: Ranked, position: int | None, ranking: Ranking, words: str, aims: Sequence[str]
) -> list[str]:
    p = own.prediction
    best = ranking.winner
    place = f"is number {position}" if position else f"is not among the best {len(ranking.best)}"
    lines = _wrapped(
        f"Your plan ({words}) {place}: {interval(p.step_seconds)} a step, "
        f"{memory_words(p.memory)}, as {plan_words(own)}."
    )
    if best is not None and position != 1:
        lines += _wrapped(f"  What it loses: {_lost(best, own, aims)}", 2)
    return lines


def nothing_fits_lines(ranking: Ranking) -> list[str]:
    """That no plan keeps the constraints, and how near the nearest comes."""
    lines = [f"None of {ranking.considered:,} plans is possible on this machine."]
    if ranking.near_misses:
        nearest = ranking.near_misses[0]
        lines += _wrapped(
            f"The nearest is {in_words(nearest.plan)}: {too_full(nearest.prediction.memory)}"
        )
    return lines


def too_full(memory: MemoryPrediction) -> str:
    """What does not fit, the largest parts first."""
    parts = sorted(memory.lines.items(), key=lambda item: -item[1])[:4]
    told = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts if size > 0)
    rank = f" on pipeline rank {memory.pp_rank}" if memory.pp_rank else ""
    return f"{memory.total.value / _GIB:.1f} GiB of {memory.limit / _GIB:.1f} GiB{rank} ({told})."


def ways_lines(ways: Sequence[Way], whole_run: bool) -> list[str]:
    """The ways to make an impossible recipe possible, one below the other."""
    if not ways:
        return ["Nothing in the catalogue is enough for it: choose a smaller model or batch."]
    unit = "the run" if whole_run else "a million tokens"
    lines = ["What would make it possible, the cheapest first:"]
    for number, way in enumerate(ways, 1):
        p = way.ranked.prediction
        change = str(way.change) if way.change.values else "the recipe as it is"
        price = f", ${way.dollars:,.2f}" if way.dollars else ""
        lines += ["", f"  {number}. {change} on {way.devices}"]
        lines += _wrapped(
            f"     {duration(way.seconds)}{price} for {unit}; {interval(p.step_seconds)} a step, "
            f"{memory_words(p.memory)}, {p.mfu:.0%} MFU, {p.joules_per_token:.3g} J/token",
            5,
        )
        lines += _wrapped(f"     {in_words(p.plan)}, micro-batch {p.plan.micro_batch}", 5)
    return lines


def what_if_lines(found: WhatIf, aims: Sequence[str] = ("time",)) -> list[str]:
    """The best plan before and after, and whether it is another one."""
    before, after = found.before.winner, found.after.winner
    lines = [f"What if {_and(found.changes)}:"]
    for name, each in (("before", before), ("after", after)):
        if each is None:
            lines.append(f"  {name:<7} nothing fits")
            continue
        p = each.prediction
        cost = f", ${p.dollars * 1e6 / p.plan.batch_tokens:.3g}/M tokens" if p.dollars else ""
        lines += _wrapped(
            f"  {name:<7} {interval(p.step_seconds)}, {count(p.tokens_per_second)} tokens/s, "
            f"{p.mfu:.0%} MFU, {memory_cell(p.memory)}, {p.joules_per_token:.3g} J/token{cost}",
            10,
        )
        lines += _wrapped(f"          {plan_words(each)}", 10)
    if before is not None and after is not None:
        lines += _wrapped(f"  {_verdict(found, before, after, aims)}", 2)
    return lines


def _verdict(found: WhatIf, before: Ranked, after: Ranked, aims: Sequence[str]) -> str:
    speed = after.prediction.tokens_per_second / before.prediction.tokens_per_second
    change = f"{_times(speed)} the tokens a second"
    if not found.winner_changes:
        return f"The same plan stays the best; it has {change}."
    if found.kept is None:
        return f"Another plan is the best, with {change}: the one before does not run there."
    return (
        f"Another plan is the best, with {change}; the one before: {_lost(after, found.kept, aims)}"
    )


def last_lines(ranking: Ranking, seconds: float) -> list[str]:
    """Where the rates are from, and what became of all candidates."""
    parts = [f"{ranking.considered:,} legal plans", f"{ranking.too_large:,} too large"]
    parts += [f"{ranking.pruned:,} too slow by their bounds", f"{ranking.predicted:,} predicted"]
    counts = f"{', '.join(parts)}; {seconds:.1f} s."
    if ranking.winner is None:
        return [counts]
    source = ranking.winner.prediction.source
    return [f"Rates: {source}. In brackets: what holds four times of five.", counts]


def interval(time: Interval) -> str:
    """ "1.23 s (1.02–1.48)"; four times of five it is within."""
    unit, factor = next(
        (name, size)
        for name, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
        if time.value >= size or name == "µs"
    )
    digits = max(0, 2 - math.floor(math.log10(max(time.value / factor, 1e-9))))
    low, value, high = (f"{each / factor:.{digits}f}" for each in (time.low, time.value, time.high))
    return f"{value} {unit} ({low}–{high})"


def seconds_text(seconds: float) -> str:
    """ "1.23 s", "45 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def duration(seconds: float) -> str:
    """A long time as a person says it: "3.2 days"."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def memory_cell(memory: MemoryPrediction) -> str:
    """ "61.2 of 80.0 GiB"."""
    return f"{memory.total.value / _GIB:.1f} of {memory.limit / _GIB:.1f} GiB"


def memory_words(memory: MemoryPrediction) -> str:
    """The same, and whether it may not be enough after all."""
    tight = memory.fits and memory.total.high > memory.limit
    return f"{memory_cell(memory)} a device{' (tight)' if tight else ''}"


def count(number: float) -> str:
    """ "410 k", "1.3 M"."""
    for suffix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {suffix}"
    return f"{number:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times"


def _keys(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
    )


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _wrapped(text: str, indent: int = 0) -> list[str]:
    lead = len(text) - len(text.lstrip())
    return textwrap.wrap(
        text.strip(),
        WIDTH,
        initial_indent=" " * lead,
        subsequent_indent=" " * max(lead, indent),
        break_on_hyphens=False,
    )
