"""Predicted against published steps: errors, ranks, regret and memory, beside a null model.

    python benchmarks/planner_truth.py published_runs.csv [--rows 10] [--all]

Of each cluster at most ten rows fit its constants; which, their plans alone decide. All errors are
of the other rows. The null model is one MFU for a cluster, the mean of the same rows. Any CSV with
the columns of `published_runs.csv` will do.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run as a file, too

from benchmarks.planner_memory import devices_of, memory_report, settled
from benchmarks.published import Run, read_runs
from trainwright.planner.cluster.catalogue import device, link
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.cost.fit import Measured, fit, representative
from trainwright.planner.cost.residual import correction, features
from trainwright.planner.cost.step import step_time
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.frontier import NOISE
from trainwright.planner.search.ranking import simplicity
from trainwright.planner.shapes import flops_per_token

GIB = 1 << 30
# Devices by the names that the table's readers give, nodes, and what joins them.
_DEVICES = {"A100-40G": "A100-40G-SXM", "A100-80G": "A100-80G-SXM", "H100-80G": "H100-SXM"}
_HBM2: dict[str, Any] = {"memory_bytes": 96e9, "memory_bandwidth": 2.4e12, "watts": 500.0}
_JEAN_ZAY = Link("4 Omni-Path 100", 1e-6, 50e9, 50e9, shared=True)
_FIELDS = {"A": ("NVLink-3", "InfiniBand-HDR"), "H": ("NVLink-4", "InfiniBand-NDR")}


@dataclass(frozen=True)
class Tested:
    """A run that was not fitted, and the seconds that were foretold."""

    run: Run
    seconds: float
    spread: float  # relative half width of the interval
    null: float

    @property
    def error(self) -> float:
        """Relative, positive where the prediction was too long."""
        assert self.run.step_seconds is not None
        return self.seconds / self.run.step_seconds - 1

    @property
    def inside(self) -> bool:
        """Whether the measured step is within the interval."""
        return abs(math.log(1 + self.error)) <= math.log(1 + self.spread)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv")
    parser.add_argument("--rows", type=int, default=10, help="most rows that fit a cluster")
    parser.add_argument("--all", action="store_true", help="print every tested row")
    options = parser.parse_args()
    runs = read_runs(options.csv)
    timed = [
        replace(run, plan=settled(run, devices_of(run)))
        for run in runs
        if run.job is not None and run.step_seconds
    ]
    print(f"{len(runs)} rows, {len(timed)} with a shape and a step time\n")
    tested: list[Tested] = []
    everything: list[Tested] = []
    for name, rows in by_cluster(timed).items():
        found = predict_others(rows, options.rows)
        print(f"{name}: fitted to {len(rows) - len(found.tested)} rows: {found.constants}")
        tested += found.tested
        everything += found.tested + found.fitted
    print()
    for line in errors(tested):
        print(line)
    print()
    for line in regrets(everything):
        print(line)
    print()
    for line in memory_report(runs):
        print(line)
    print()
    left_out = [run for run in runs if run.problem]
    for problem in sorted({run.problem or "" for run in left_out}):
        many = sum(run.problem == problem for run in left_out)
        print(f"left out: {many} rows: {problem}")
    if options.all:
        for each in sorted(tested, key=lambda each: -abs(each.error)):
            print(f"{each.error:+7.1%}  row {each.run.row}  {describe(each.run)}")


def by_cluster(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of one device and software on one machine; Selene ran two papers' tables."""
    groups = defaultdict(list)
    for run in runs:
        selene = run.source.startswith(("Narayanan", "Korthikanti"))
        groups["Selene" if selene else f"{run.source} {run.gpu}"].append(run)
    return dict(groups)


@dataclass(frozen=True)
class Predicted:
    """A cluster's predictions."""

    constants: str
    tested: list[Tested]
    fitted: list[Tested]


def predict_others(runs: Sequence[Run], most: int) -> Predicted:
    """Fit some runs of a cluster, and predict them all; where there are few, half of them."""
    places = [features(*_parts(run)) for run in runs]
    chosen = representative(places, min(most, max(1, 2 * len(runs) // 3)))
    measured = [_measured(runs[index]) for index in chosen]
    example = runs[0]
    rates, observed = fit(measured, partial(_machine_of, example), Rates())
    null = math.exp(float(np.mean([math.log(each.seconds / _flops(each)) for each in measured])))
    tested, fitted = [], []
    for index, run in enumerate(runs):
        job, plan = _parts(run)
        cluster = machine(run, rates)
        lean = correction(observed, job, plan, rates.spread)
        seconds = lean.factor * step_time(job, plan, cluster, simulated=False).total
        each = Tested(run, seconds, lean.spread, null * _flops(_measured(run)))
        (fitted if index in chosen else tested).append(each)
    constants = ", ".join(
        f"{name} {getattr(rates, name):.2g}"
        for name in ("products", "attention", "memory", "links", "networks", "kernel_seconds")
    )
    return Predicted(constants, tested, fitted)


def machine(run: Run, rates: Rates) -> Cluster:
    """The cluster that a run was on."""
    name = run.gpu
    kind = _device(name)
    inside, between = _FIELDS.get(name[0], ("NVLink-5", "InfiniBand-NDR"))
    whole_rack = name.startswith("GB") and run.gpus >= 64
    per_node = min(64 if whole_rack else 8, run.gpus)
    outside = _JEAN_ZAY if "BigScience" in run.source else link(between)
    pool = Pool(name, kind, -(-run.gpus // per_node), per_node, link(inside), outside, rates=rates)
    return Cluster(f"{name}-{run.gpus}", (pool,))


def _device(name: str) -> DeviceKind:
    if name == "H100-96G":
        return replace(device("H100-SXM"), name=name, **_HBM2)
    return device(_DEVICES.get(name, name.split("-")[0]))


def _machine_of(example: Run, measured: Measured, rates: Rates) -> Cluster:
    return machine(replace(example, gpus=measured.plan.world_size), rates)


def errors(tested: Sequence[Tested]) -> Iterable[str]:
    """A table of each source: errors beside the null model's, rank correlation of FLOP/s, and how
    many steps are inside the interval that should hold four of five."""
    titles = ("rows", "MAPE", "null", "median", "worst", "rank", "inside")
    yield f"{'source':<26}" + "".join(f"{title:>8}" for title in titles)
    groups = defaultdict(list)
    for each in tested:
        groups[each.run.source].append(each)
    selene = [e for e in tested if e.run.source.startswith(("Narayanan", "Korthikanti"))]
    groups["Narayanan + Korthikanti"] = selene
    for source, rows in groups.items():
        if not rows:
            continue
        off = np.abs([each.error for each in rows])
        null = np.abs([each.null / (each.run.step_seconds or 1) - 1 for each in rows])
        yield (
            f"{source:<26}{len(rows):>8}{off.mean():>8.1%}{null.mean():>8.1%}"
            f"{np.median(off):>8.1%}{off.max():>8.1%}{_rank(rows):>8.2f}"
            f"{np.mean([each.inside for each in rows]):>8.0%}"
        )


def _rank(rows: Sequence[Tested]) -> float:
    """Spearman's correlation of predicted and measured FLOP/s."""
    if len(rows) < 3:
        return math.nan
    flops = [_flops(_measured(each.run)) for each in rows]
    predicted = [f / each.seconds for f, each in zip(flops, rows, strict=True)]
    measured = [f / (each.run.step_seconds or 1) for f, each in zip(flops, rows, strict=True)]
    return float(spearmanr(predicted, measured)[0])


def regrets(rows: Sequence[Tested]) -> Iterable[str]:
    """Of plans of one model, batch and cluster: how much slower the chosen is than the best."""
    groups: dict[tuple[object, ...], list[Tested]] = defaultdict(list)
    for each in rows:
        run = each.run
        job, plan = _parts(run)
        c = job.config
        shape = (c.num_layers, c.hidden_size, c.num_heads, job.batch_sequences, plan.precision)
        groups[run.source, run.gpus, *shape].append(each)
    yield f"{'plans of one model':<52}{'plans':>6}{'regret':>8}  chosen"
    for key, plans in sorted(groups.items(), key=str):
        layouts = {_layout(each.run) for each in plans}
        if len(layouts) < 3:
            continue
        # As `trainwright plan` chooses: of those that are as good as the best, the simplest.
        limit = (1 + NOISE) * min(each.seconds for each in plans)
        near = [each for each in plans if each.seconds <= limit]
        chosen = min(near, key=lambda each: (simplicity(_parts(each.run)[1]), each.seconds))
        best = min(each.run.step_seconds or math.inf for each in plans)
        regret = (chosen.run.step_seconds or 0) / best - 1
        batch = _parts(chosen.run)[0].batch_sequences
        name = f"{key[0]}, {chosen.run.model}, {key[1]} GPUs, batch {batch}"
        yield f"{name:<52}{len(plans):>6}{regret:>8.1%}  {describe(chosen.run)}"


def describe(run: Run) -> str:
    """A run's plan in a line."""
    job, plan = _parts(run)
    names = {"tp": plan.tp, "pp": plan.pp, "v": plan.virtual_stages, "cp": plan.cp, "ep": plan.ep}
    words = [f"{name} {size}" for name, size in names.items() if size > 1]
    words += [f"dp {plan.data_ranks}", f"zero {plan.zero}", f"micro-batch {plan.micro_batch}"]
    return (
        f"{run.model} {run.gpu}×{run.gpus} s {job.sequence_length} {plan.precision}: "
        + ", ".join([*words, f"recompute {plan.recompute}"])
    )


def _layout(run: Run) -> tuple[object, ...]:
    _, plan = _parts(run)
    return (plan.tp, plan.pp, plan.virtual_stages, plan.cp, plan.ep, plan.zero, plan.micro_batch)


def _parts(run: Run) -> tuple[Job, Plan]:
    assert run.job is not None and run.plan is not None
    return run.job, run.plan


def _measured(run: Run) -> Measured:
    assert run.step_seconds is not None
    job, plan = _parts(run)
    return Measured(job, plan, run.step_seconds)


def _flops(each: Measured) -> float:
    """Model FLOPs of a device's step."""
    flops = flops_per_token(each.job.config, each.job.sequence_length) * each.job.batch_tokens
    return flops / each.plan.world_size


if __name__ == "__main__":
    main()
