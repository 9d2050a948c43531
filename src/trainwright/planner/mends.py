"""Changes of a candidate's fields that may mend what is wrong with it. No torch.

`planner.legality` weighs them; here they need not be good, only to be there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from trainwright.planner.candidate import Candidate
from trainwright.planner.layout import divisors, split_layers, split_rows
from trainwright.planner.plan import Recompute
from trainwright.planner.schedules import SCHEDULES

Change = dict[str, Any]  # fields and their new values
Mend = Callable[[Candidate], Iterable[Change]]
_MOST_MULTIPLES = 2  # of a length or a batch to try below and above what was asked for


def degrees(*axes: str) -> Mend:
    """Other degrees along these axes, where the user gave them."""

    def changes(c: Candidate) -> Iterable[Change]:
        for axis in axes:
            if axis not in c.derived:
                yield from ({axis: n} for n in divisors(c.world) if n != getattr(c, axis))

    return changes


def other_values(**fields: Any) -> Mend:
    """These values, one field at a time."""
    return lambda c: [{k: v} for k, v in fields.items() if getattr(c, k) != v]


def any_of(*sources: Mend) -> Mend:
    return lambda c: (change for source in sources for change in source(c))


def left_whole(part: str) -> Mend:
    """That part of every block not cut by tp."""
    return lambda c: [{"whole": tuple(sorted({*c.whole, part}))}]


def without_whole(part: str) -> Mend:
    """That part cut like the others."""
    return lambda c: [{"whole": tuple(each for each in c.whole if each != part)}]


def schedules(*names: str) -> Mend:
    """These schedules, with the stages a worker that they want where those were given."""

    def changes(c: Candidate) -> Iterable[Change]:
        for name in names:
            least = SCHEDULES[name].least_virtual
            yield {"schedule": name}
            if "virtual_stages" not in c.derived:
                yield {"schedule": name, "virtual_stages": least}

    return changes


def virtual_stages(c: Candidate) -> Iterable[Change]:
    if "virtual_stages" not in c.derived:
        yield from ({"virtual_stages": n} for n in (1, 2, 3, 4) if n != c.virtual_stages)


def lengths(c: Candidate) -> Iterable[Change]:
    """Lengths near the one asked for that divide, within what the model knows."""
    assert c.sequence_length is not None
    unit = columns_unit(c)
    most = c.model.max_positions if c.model is not None else None
    for length in _multiples(c.sequence_length, unit):
        if most is None or length <= most:
            yield {"sequence_length": length}


def batches(c: Candidate) -> Iterable[Change]:
    """Batches near the one asked for that share out evenly."""
    assert c.rows is not None
    unit = c.data_ranks * (c.micro_batch or 1)
    yield from ({"rows": rows} for rows in _multiples(c.rows, unit))
    yield from ({"rows": rows} for rows in _multiples(c.rows, c.data_ranks))


def larger_batches(c: Candidate) -> Iterable[Change]:
    """Enough rows for the micro-batches that the schedule wants."""
    if c.rows is not None:
        yield {"rows": c.data_ranks * (c.micro_batch or 1) * 2 * c.pp}


def micro_batches(c: Candidate) -> Iterable[Change]:
    if c.micro_batch is not None and c.own_rows:
        unit = math.gcd(*c.own_rows)
        yield from ({"micro_batch": n} for n in divisors(unit) if n != c.micro_batch)


def replica_rows(c: Candidate) -> Iterable[Change]:
    """The batch over the replicas in about the same proportions, or evenly."""
    weights = [max(1, rows) for rows in c.rows_by_replica]
    for unit in (c.dp_shard * (c.micro_batch or 1), c.dp_shard):
        if c.rows is None or len(weights) != c.dp_replicate or c.rows < unit * len(weights):
            continue
        if c.rows % unit == 0:
            yield {"rows_by_replica": split_rows(c.rows, weights, unit)}
        if sum(c.rows_by_replica):
            yield {"rows": sum(c.rows_by_replica)}
    yield {"rows_by_replica": ()}


def _multiples(wanted: int, unit: int) -> list[int]:
    below, above = wanted // unit * unit, -(-wanted // unit) * unit
    near = [
        n for step in range(_MOST_MULTIPLES) for n in (below - step * unit, above + step * unit)
    ]
    return [n for n in near if n > 0]


def columns_unit(c: Candidate) -> int:
    """What a row's length must be a multiple of."""
    halves = 2 if c.cp > 1 and c.cp_method != "ulysses" else 1
    return c.tp * c.cp * halves


def without_pages(c: Candidate) -> Iterable[Change]:
    """The optimizer that is the same but for its pages."""
    yield {"optimizer": c.optimizer.removeprefix("paged-")}


def without_eight_bits(c: Candidate) -> Iterable[Change]:
    """The optimizer that is the same with states of 32 bits."""
    yield {"optimizer": c.optimizer.removesuffix("-8bit")}


def plain_policies(c: Candidate) -> Iterable[Change]:
    """Named policies in place of memory budgets."""

    def named(*policies: Recompute) -> tuple[Recompute, ...]:
        return tuple(each if isinstance(each, str) else "selective" for each in policies)

    yield {
        "recompute": named(c.recompute)[0],
        "recompute_by_stage": named(*c.recompute_by_stage),
        "recompute_by_layer": named(*c.recompute_by_layer),
    }


def default_layers(c: Candidate) -> Iterable[Change]:
    yield {"stage_layers": ()}
    if c.model is not None and c.pp > 1 and c.stages <= c.model.num_layers:
        yield {"stage_layers": split_layers(c.model, c.stages)}
