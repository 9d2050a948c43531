"""The search itself: candidates on all arrangements of devices, looked at the likeliest first.

What is expected of a candidate is its estimate times how far predictions were from the estimates of
plans with the same degrees, or on the same devices. So a family of plans that does better than was
expected is followed, and one that does worse is left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trainwright.planner.candidate import Candidate
from trainwright.planner.cluster.describe import Cluster
from trainwright.planner.cost.prediction import MemoryPrediction, Prediction
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.bounds import least_bytes, least_seconds
from trainwright.planner.search.columns import Columns, codes
from trainwright.planner.search.devices import Arrangement
from trainwright.planner.search.estimate import likely_bytes, likely_seconds
from trainwright.planner.search.grid import Column, Grid, make_grid
from trainwright.planner.search.objective import Broken, Constraints, Objective, goodput
from trainwright.planner.search.stage_costs import with_split_layers

Predict = Callable[[Job, Plan, Cluster], Prediction]
PredictMemory = Callable[[Job, Plan, Cluster], MemoryPrediction]

_FAMILY = ("world", "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
_TOO_LARGE = 1e6  # what is likely not to fit comes after all that is
_MISSES = 10  # plans that do not fit, of which all is foretold
NOISE = 0.01  # relative; of plans that are as good as equal the simplest is taken
_NEAR = 50_000  # of the likeliest candidates, among which the next is chosen
_MEMORY_TRIES = 4  # plans whose memory alone is predicted, for each that is looked at in detail


@dataclass(frozen=True)
class Ranked:
    """A plan with what is foretold of it.

    `cluster` has the devices that it runs on, its pools in the order of the plan's ranks. `score`
    is what was compared, the smaller the better; `goodput` the share of time that failures leave.
    """

    prediction: Prediction
    cluster: Cluster
    score: float
    goodput: float = 1.0
    broken: tuple[Broken, ...] = ()  # constraints that it does not keep; () in the ranking itself

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return self.prediction.plan


@dataclass
class Counts:
    """What became of the candidates; see `ranking.Ranking`."""

    considered: int = 0
    illegal: int = 0
    too_large: int = 0
    pruned: int = 0
    predicted: int = 0


@dataclass(frozen=True)
class _Space:
    """Candidates on one arrangement of devices, with what is known of each at once."""

    grid: Grid
    arrangement: Arrangement
    least: Column  # score
    likely: Column  # score
    held: Column  # likely bytes, as a share of the limit
    family: Column  # a number for each combination of degrees


@dataclass
class Search:
    """One search: what is asked, and what has been found so far."""

    job: Job
    like: Candidate
    fixed: Mapping[str, Any]
    objective: Objective
    constraints: Constraints
    predict: Predict
    predict_memory: PredictMemory
    top: int
    most: int
    prune: bool
    kept: list[Ranked] = field(default_factory=list)
    missed: list[Ranked] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    unseen: int = 0
    _spaces: list[_Space] = field(default_factory=list)

    def add(self, arrangement: Arrangement, *, offload: bool) -> int:
        """Takes in all candidates on an arrangement; how many are legal there."""
        like = self.like
        if "rows_by_replica" in arrangement.given:
            like = replace(like, rows_by_replica=arrangement.given["rows_by_replica"])
        fixed = {**self.fixed, **arrangement.given}
        grid = make_grid(like, [arrangement.world], fixed, offload)
        self.counts.considered += len(grid)
        self.counts.illegal += grid.illegal
        if len(grid):
            bytes_ = least_bytes(Columns(self.job, grid))
            fits = bytes_ <= self._limit(arrangement.cluster)
            # One stays in any case, to tell how far the smallest is from fitting.
            fits[bytes_.argmin()] = True
            self.counts.too_large += int((~fits).sum())
            self._spaces.append(self._space(grid.where(fits), arrangement))
        return len(grid)

    def _space(self, grid: Grid, arrangement: Arrangement) -> _Space:
        columns, cluster = Columns(self.job, grid), arrangement.cluster
        family = codes(grid, _FAMILY)
        return _Space(
            grid,
            arrangement,
            self._scores(least_seconds(columns, cluster), arrangement, busy=False),
            self._scores(likely_seconds(columns, cluster), arrangement, busy=True),
            likely_bytes(columns) / self._limit(cluster),
            np.unique(family, return_inverse=True)[1],
        )

    def _scores(self, seconds: Column, arrangement: Arrangement, *, busy: bool) -> Column:
        """Scores of steps of so many seconds, on devices at rest, at the least, or `busy`."""
        watts = dollars = carbon = 0.0
        left = arrangement.world
        for pool in arrangement.cluster.pools:
            devices = min(left, pool.devices)
            left -= devices
            draws = devices * (pool.device.watts if busy else pool.device.idle_watts)
            watts += draws
            carbon += draws * pool.grams_per_kwh / 3.6e6
            dollars += devices * pool.dollars_per_hour / 3600
        seconds = seconds / goodput(self.job, arrangement.cluster, arrangement.world)
        rates = {"time": 1.0, "cost": dollars, "energy": watts, "carbon": carbon}
        values = {name: rate * seconds for name, rate in rates.items()}
        return self.objective.mixed(values, self.job.batch_tokens)

    def _limit(self, cluster: Cluster) -> float:
        """Bytes of a device; of unequal ones the largest, since a pool may get less to hold."""
        limit = max(pool.device.memory_bytes for pool in cluster.pools)
        return min(limit, self.constraints.memory_bytes or math.inf)

    def look(self) -> None:
        """Predicts the likeliest candidates, until the rest cannot win or enough are known."""
        if not self._spaces:
            return
        spaces, self._spaces = self._spaces, []
        every = _Likely(spaces)
        enough = self.counts.predicted + self.most
        for _ in range(_MEMORY_TRIES * self.most):
            found = every.next() if self.counts.predicted < enough else None
            if found is None:
                break
            index, space, place, likely_fits = found
            plan, cluster = self._plan(space, place), space.arrangement.cluster
            ranked, share = self.look_at(plan, cluster, likely_fits=likely_fits)
            every.learn(index, None if ranked is None else ranked.score, share)
            if self.prune and len(self.kept) >= self.top:
                self.counts.pruned += every.leave_out(self._worst_kept())
        self.unseen += every.left

    def _worst_kept(self) -> float:
        """What a candidate must be below to be ranked, or to be preferred as simpler."""
        scores = sorted(each.score for each in self.kept)
        return max(scores[self.top - 1], scores[0] * (1 + NOISE))

    def _plan(self, space: _Space, place: int) -> Plan:
        candidate = space.grid.candidate(place)
        cluster = space.arrangement.cluster
        kind, compiles = cluster.pools[0].device, candidate.compile
        if compiles == "auto":
            on_gpu = candidate.device == "cuda" and candidate.has_compiler is not False
            compiles = on_gpu and not candidate.splits
        plan = candidate.plan(
            threads=self.fixed.get("threads", kind.units if kind.kind == "cpu" else 1),
            compile=compiles,
            activation_offload=self.fixed.get("activation_offload", False),
        )
        if len(cluster.pools) > 1 and not candidate.stage_layers:
            plan = with_split_layers(self.job, plan, cluster)
        return plan

    def look_at(
        self, plan: Plan, cluster: Cluster, *, likely_fits: bool = True
    ) -> tuple[Ranked | None, float]:
        """What is foretold of a plan, which is kept or missed, and how full its memory is.

        None where it does not fit and enough of those are known. Of one that is not `likely_fits`
        the memory is foretold first, and often alone.
        """
        if not likely_fits and len(self.missed) >= _MISSES:
            share = self._share(self.predict_memory(self.job, plan, cluster))
            if share > 1:
                self.counts.too_large += 1
                return None, share
        prediction = self.predict(self.job, plan, cluster)
        share = self._share(prediction.memory)
        if share > 1:
            self.counts.too_large += 1
        else:
            self.counts.predicted += 1
        lasting = goodput(self.job, cluster, plan.world_size)
        ranked = Ranked(
            prediction,
            cluster,
            self.objective.score(prediction, lasting),
            lasting,
            tuple(self.constraints.broken(prediction, lasting)),
        )
        (self.missed if ranked.broken else self.kept).append(ranked)
        return ranked, share

    def _share(self, memory: MemoryPrediction) -> float:
        return memory.total.value / min(memory.limit, self.constraints.memory_bytes or math.inf)


class _Likely:
    """Candidates of several spaces in one row, and which is the likeliest of those left."""

    def __init__(self, spaces: Sequence[_Space]) -> None:
        self.spaces = spaces
        self.sizes = np.cumsum([0] + [len(space.grid) for space in spaces])
        families = np.cumsum([0] + [int(space.family.max()) + 1 for space in spaces])
        self.least, self.likely, self.held = (
            np.concatenate([getattr(space, name) for space in spaces])
            for name in ("least", "likely", "held")
        )
        self.family = np.concatenate(
            [space.family + first for space, first in zip(spaces, families, strict=False)]
        )
        self.gone = np.zeros(len(self.least), dtype=bool)
        # What is far behind is not sorted anew each time.
        first = np.where(self.held > 1, _TOO_LARGE, 1.0) * self.likely
        self.near = np.sort(np.argsort(first, kind="stable")[:_NEAR])
        self.slower = _Corrections(families)
        self.fuller = _Corrections(families)

    @property
    def left(self) -> int:
        """Candidates that nobody has looked at or left out."""
        return int((~self.gone).sum())

    def next(self) -> tuple[int, _Space, int, bool] | None:
        """The likeliest, its space, its place there, whether it may fit; None if none is left."""
        near = self.near[~self.gone[self.near]]
        if not len(near):
            near = np.flatnonzero(~self.gone)[:_NEAR]
        if not len(near):
            return None
        self.near, family = near, self.family[near]
        expected = self.likely[near] * self.slower.factors()[family]
        full = self.held[near] * self.fuller.factors()[family] > 1
        expected[full] *= _TOO_LARGE
        first = int(expected.argmin())
        index = int(near[first])
        self.gone[index] = True
        space = int(np.searchsorted(self.sizes, index, side="right")) - 1
        return index, self.spaces[space], index - int(self.sizes[space]), not full[first]

    def learn(self, index: int, score: float | None, held: float) -> None:
        """What was predicted of one."""
        self.fuller.known[self.family[index]] = held / self.held[index]
        if score is not None:
            self.slower.known[self.family[index]] = score / self.likely[index]

    def leave_out(self, score: float) -> int:
        """Leaves out what cannot be below a score; how many those are."""
        lost = ~self.gone & (self.least > score)
        self.gone |= lost
        return int(lost.sum())


class _Corrections:
    """What was predicted over what was expected, by family; `firsts` are the first of each space.

    Of a family that nobody has looked at it is the median of those on the same devices, or 1.
    """

    def __init__(self, firsts: Column) -> None:
        self.firsts, self.known = firsts, np.full(int(firsts[-1]), math.nan)

    def factors(self) -> Column:
        """By family."""
        factors = self.known.copy()
        for first, end in itertools.pairwise(self.firsts.tolist()):
            known = self.known[first:end]
            seen = known[~np.isnan(known)]
            usual = float(np.median(seen)) if len(seen) else 1.0
            factors[first:end] = np.where(np.isnan(known), usual, known)
        return factors
