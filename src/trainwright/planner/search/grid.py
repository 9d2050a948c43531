"""Every legal candidate of a job on a number of workers, as columns of numbers.

There are up to millions, too many to ask the rules about one by one. But a rule looks at a few
fields only: at the degrees, or at the pipeline's schedule and its micro-batches, or at what is
sharded and recomputed. Each such part is asked about once, with plain values elsewhere, and the
legal parts are multiplied out. A test holds the result against the rules, candidate by candidate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.planner.candidate import DEGREES, Candidate
from trainwright.planner.conditions import cut_badly
from trainwright.planner.layout import divisors
from trainwright.planner.legality import beside_mistakes, is_legal
from trainwright.planner.schedules import SCHEDULES

Column = NDArray[Any]

_MOST_ROWS = 64  # of a micro-batch: more gain nothing that can be measured
_MOST_VIRTUAL = 8
# Values of what is not a number; a column has their places. `gpipe` takes 1f1b's time and holds
# more, so it is there for those who ask for it.
VALUES: dict[str, tuple[Any, ...]] = {
    "schedule": ("1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"),
    "cp_method": ("ring", "all_gather", "ulysses"),
    "recompute": ("none", "selective", "full"),
    "offload": ("none",),
}
OFFLOADS = ("none", "optimizer", "parameters")
_DEGREES = ("world", *DEGREES, "ep")
_PIPELINE = ("schedule", "virtual_stages", "micro_batch")
_SHARDING = ("zero", "offload", "recompute")
FIELDS = (*_DEGREES, "cp_method", *_PIPELINE, *_SHARDING)
# Fields that a user can give besides those; they are the same in all candidates.
GIVEN = ("stage_layers", "recompute_by_stage", "rows_by_replica", "whole")


@dataclass(frozen=True)
class Grid:
    """Legal candidates: a column for each of `FIELDS`, [candidates], and what is common to them.

    `values` are what the columns of fields that are no numbers point into. `illegal` counts what
    was refused, parts and all that they would have been part of as one.
    """

    like: Candidate
    columns: Mapping[str, Column]
    values: Mapping[str, tuple[Any, ...]]
    illegal: int = 0

    def __len__(self) -> int:
        return len(self.columns["world"])

    def __getitem__(self, field: str) -> Column:
        """A column; places in `values` where the field is no number."""
        return self.columns[field]

    def is_value(self, field: str, value: Any) -> Column:
        """Where a field that is no number has a value, [candidates]."""
        values = self.values[field]
        at = values.index(value) if value in values else -1
        return self.columns[field] == at

    def candidate(self, index: int) -> Candidate:
        """One of them."""
        fields: dict[str, Any] = {name: int(c[index]) for name, c in self.columns.items()}
        fields |= {name: values[fields[name]] for name, values in self.values.items()}
        return replace(self.like, derived=frozenset(), whole=self.whole(fields["tp"]), **fields)

    def whole(self, tp: int) -> tuple[str, ...]:
        """The parts of a block that so many workers leave whole."""
        return _whole(self.like, tp)

    def where(self, kept: Column) -> Grid:
        """Some of them, by a mask or by their places."""
        columns = {name: column[kept] for name, column in self.columns.items()}
        return replace(self, columns=columns)

    @property
    def data_ranks(self) -> Column:
        """Ways in which rows are divided, [candidates]."""
        return self["dp_replicate"] * self["dp_shard"]

    @property
    def accumulation(self) -> Column:
        """Micro-batches a step, [candidates]; the most where replicas differ."""
        if self.like.rows_by_replica:
            return max(self.like.rows_by_replica) // self["dp_shard"] // self["micro_batch"]
        assert self.like.rows is not None
        return self.like.rows // self.data_ranks // self["micro_batch"]


def make_grid(
    like: Candidate, worlds: Sequence[int], fixed: Mapping[str, Any], offload: bool = False
) -> Grid:
    """All legal candidates that spread the job of `like` over one of `worlds` workers.

    `like` has all that is not searched, its rows and its sequence length among it. `fixed` are
    fields that are given: those of `FIELDS` and `GIVEN`. With `offload` the host's memory is used
    as well; else only where it is given.
    """
    like = replace(like, derived=frozenset(), **{k: fixed[k] for k in GIVEN if k in fixed})
    values = {**VALUES, "offload": OFFLOADS if offload else ("none",)}
    values |= {name: (fixed[name],) for name in values if name in fixed}
    parts = _Parts(like, fixed, values)
    rows: list[NDArray[np.int32]] = []
    for world in worlds:
        for *degrees, method in parts.degrees(world):
            inner = parts.inner(*degrees)
            outer = np.array([*degrees, method], dtype=np.int32)
            rows.append(np.hstack([np.broadcast_to(outer, (len(inner), len(outer))), inner]))
    table = np.concatenate(rows) if rows else np.empty((0, len(FIELDS)), dtype=np.int32)
    columns = {
        name: np.ascontiguousarray(column) for name, column in zip(FIELDS, table.T, strict=True)
    }
    return Grid(like, columns, values, parts.illegal)


def _whole(like: Candidate, tp: int) -> tuple[str, ...]:
    """As is given, or what so many workers cannot cut."""
    if tp == 1 or like.whole or like.model is None:
        return like.whole if tp > 1 else ()
    return cut_badly(like.model, tp)


class _Parts:
    """The legal parts of candidates, each asked about once."""

    def __init__(
        self, like: Candidate, fixed: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]
    ) -> None:
        # Plain values, which every rule allows.
        plain: dict[str, Any] = dict.fromkeys((*_DEGREES, "virtual_stages"), 1)
        plain |= dict.fromkeys(GIVEN, ()) | {"zero": 0, "micro_batch": None, "schedule": "1f1b"}
        plain |= {"cp_method": "ring", "offload": "none", "recompute": "none"}
        self.plain = replace(like, **plain)
        self.like, self.fixed, self.values = like, fixed, values
        self.illegal = 0
        self.known: dict[tuple[int, ...], NDArray[np.int32]] = {}
        self.shardings = cache(lambda *key: tuple(self._shardings(*key)))

    def degrees(self, world: int) -> Iterator[tuple[int, ...]]:
        """world, pp, dp_replicate, dp_shard, cp, tp, ep and the place of cp's method."""
        alone = {axis: set(self._alone(axis, world)) for axis in (*DEGREES, "ep")}
        methods = range(len(self.values["cp_method"]))
        for tp, cp, pp in itertools.product(*(sorted(alone[axis]) for axis in ("tp", "cp", "pp"))):
            data, rest = divmod(world, tp * cp * pp)
            for shards in divisors(data) if not rest else ():
                if shards not in alone["dp_shard"] or data // shards not in alone["dp_replicate"]:
                    continue
                sizes = (world, pp, data // shards, shards, cp, tp)
                for ep in sorted(alone["ep"]):
                    for method in methods if cp > 1 else methods[:1]:
                        name = self.values["cp_method"][method]
                        if shards % ep == 0 and self._legal((*sizes, ep), cp_method=name):
                            yield (*sizes, ep, method)

    def _alone(self, axis: str, world: int) -> Iterator[int]:
        """Degrees that are legal where all others are 1, and so perhaps elsewhere."""
        # Unequal shares are asked about where all degrees are known.
        rows = None if self.like.rows_by_replica else self.like.rows
        methods = self.values["cp_method"] if axis == "cp" else ("ring",)
        for size in divisors(world):
            fields: dict[str, Any] = {axis: size, "world": size, "rows": rows}
            if axis in ("dp_shard", "ep"):
                fields |= {"dp_shard": size, "zero": min(1, size - 1)}
            fields["whole"] = _whole(self.like, fields.get("tp", 1))
            ways = (replace(self.plain, cp_method=method, **fields) for method in methods)
            if size == self.fixed.get(axis, size) and any(map(is_legal, ways)):
                yield size

    def _legal(self, degrees: tuple[int, ...], **fields: Any) -> bool:
        named: dict[str, Any] = dict(zip(_DEGREES, degrees, strict=True))
        zero = 1 if named["dp_shard"] > 1 else 0
        named |= {"rows_by_replica": self.like.rows_by_replica, "zero": zero}
        named["whole"] = _whole(self.like, named["tp"])
        candidate = replace(self.plain, **named, **fields)
        legal = is_legal(candidate) and not (candidate.beside and beside_mistakes(candidate))
        self.illegal += not legal
        return legal

    def inner(
        self, world: int, pp: int, replicas: int, shards: int, cp: int, tp: int, ep: int
    ) -> NDArray[np.int32]:
        """What goes with such degrees: columns of `_PIPELINE` and `_SHARDING`."""
        candidate = replace(self.like, dp_replicate=replicas, dp_shard=shards)
        key = (pp, math.gcd(*candidate.own_rows), min(candidate.own_rows), min(shards, 2))
        if key not in self.known:
            lines = [
                [*pipeline, *sharding]
                for pipeline in self._pipelines(*key[:3])
                for sharding in self.shardings(pp > 1, pipeline[0], shards > 1)
            ]
            width = len(_PIPELINE) + len(_SHARDING)
            self.known[key] = np.array(lines, dtype=np.int32).reshape(-1, width)
        return self.known[key]

    def _pipelines(self, pp: int, common: int, fewest: int) -> Iterator[tuple[int, int, int]]:
        """Schedules, stages a worker and micro-batches, of a replica that has `fewest` rows."""
        like = replace(
            self.plain,
            world=pp,
            pp=pp,
            rows=fewest,
            stage_layers=self.like.stage_layers,
            recompute_by_stage=self.like.recompute_by_stage,
        )
        micros = [n for n in divisors(common) if n <= _MOST_ROWS]
        micros = [self.fixed["micro_batch"]] if "micro_batch" in self.fixed else micros
        names = self.values["schedule"] if pp > 1 else self.values["schedule"][:1]
        for place, name in enumerate(names):
            for virtual in self._virtual(name, pp):
                for micro in micros:
                    part = replace(like, schedule=name, virtual_stages=virtual, micro_batch=micro)
                    if common % micro == 0 and is_legal(part):
                        yield place, virtual, micro
                    else:
                        self.illegal += 1

    def _virtual(self, schedule: str, pp: int) -> list[int]:
        """Stages a worker that are worth a try: those that share the layers out evenly, and 2."""
        if "virtual_stages" in self.fixed:
            return [self.fixed["virtual_stages"]]
        kind, model = SCHEDULES[schedule], self.like.model
        if pp == 1:
            return [1]
        layers = model.num_layers if model is not None else 2 * pp
        most = min(kind.most_virtual or _MOST_VIRTUAL, layers // pp)
        return [
            virtual
            for virtual in range(kind.least_virtual, most + 1)
            if virtual <= 2 or layers % (pp * virtual) == 0
        ]

    def _shardings(
        self, pipelined: bool, schedule: int, sharded: bool
    ) -> Iterator[tuple[int, int, int]]:
        """What is sharded, offloaded and recomputed."""
        like = replace(
            self.plain,
            world=(2 if pipelined else 1) * (2 if sharded else 1),
            pp=2 if pipelined else 1,
            dp_shard=2 if sharded else 1,
            rows=None,
            schedule=self.values["schedule"][schedule] if pipelined else "1f1b",
        )
        if pipelined:
            like = replace(like, virtual_stages=SCHEDULES[like.schedule].least_virtual, model=None)
        zeros = [self.fixed["zero"]] if "zero" in self.fixed else [0, 1, 2, 3]
        for zero in zeros:
            for offload, recompute in itertools.product(
                range(len(self.values["offload"])), range(len(self.values["recompute"]))
            ):
                part = replace(
                    like,
                    zero=zero,
                    offload=self.values["offload"][offload],
                    recompute=self.values["recompute"][recompute],
                )
                if is_legal(part):
                    yield zero, offload, recompute
