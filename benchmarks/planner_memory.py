"""Predicted memory of published runs beside what was measured, and which of them fit.

    python -m benchmarks.planner_memory published_runs.csv [--fit]

What no formula gives of a stack, its allocator's holes and a constant, was fitted to the rows in
`FITTED`: every fourth of a source that has measurements, and torchtitan's one without compile.
Errors are of the other rows. `--fit` fits them again.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean

from benchmarks.published import GIB, Run, read_runs
from trainwright.planner.cluster.catalogue import device
from trainwright.planner.cluster.describe import Cluster, Link, Pool
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.prediction import MemoryPrediction
from trainwright.planner.plan import Plan, Recompute

FITTED = frozenset(
    {
        "BigScience-JZ-A100 GPT-187B tp8 pp10 dp4 mbs1: 33",
        "BigScience-JZ-A100 GPT-181B tp8 pp6 dp8 mbs1: 38",
        "BigScience-JZ-A100 GPT-196B tp8 pp6 dp8 mbs2: 65",
        "BigScience-JZ-A100 GPT-181B tp8 pp6 dp8 mbs4: 53",
        "BigScience-JZ-A100 GPT-181B tp8 pp6 dp8 mbs4: 56",
        "BigScience-JZ-A100 GPT-181B tp8 pp4 dp12 mbs4: 59",
        "BigScience-JZ-A100 GPT-181B tp4 pp6 dp16 mbs4: 75",
        "BigScience-JZ-A100 GPT-184B tp8 pp6 dp8 mbs4: 72",
        "BigScience-JZ-A100 GPT-176B tp4 pp12 dp8 mbs2: 59",
        "torchtitan Llama3.1-8B tp1 pp1 dp8 mbs2: 77",
        "torchtitan Llama3.1-8B tp1 pp1 dp128 mbs2: 67",
        "torchtitan Llama3.1-8B tp1 pp1 dp8 mbs1: 83.9",
        "torchtitan Llama3.1-405B tp8 pp8 dp8 mbs1: 75.3",
    }
)
_LINK = Link("none", 1e-6, 1e9, 1e9)


def name_of(run: Run) -> str:
    """A measured row in words that stay the same in another table."""
    plan, size = run.plan, (run.memory_bytes or 0) / GIB
    assert plan is not None
    layout = f"tp{plan.tp} pp{plan.pp} dp{plan.data_ranks} mbs{plan.micro_batch}"
    return f"{run.source} {run.model} {layout}: {size:g}"


def devices_of(run: Run) -> Cluster:
    """The run's devices, of which only the memory matters here."""
    kind = replace(device("H100-SXM"), name=run.gpu, memory_bytes=run.gpu_memory_bytes)
    return Cluster(run.gpu, (Pool(run.gpu, kind, run.gpus, 1, _LINK, _LINK),))


def settled(run: Run, cluster: Cluster) -> Plan:
    """The run's plan; where its source does not say what is recomputed, as few layers as fits.

    They are the first of each stage, as Megatron-LM's `--recompute-method block` takes them.
    """
    assert run.job is not None and run.plan is not None
    job, plan = run.job, run.plan
    if not any(word.startswith("recompute") for word in run.assumed):
        return plan
    stages = plan.stage_layers or (job.config.num_layers,)

    def recomputing(count: int) -> Plan:
        policies: list[Recompute] = []
        for layers in stages:
            policies.extend("full" if layer < count else "none" for layer in range(layers))
        return replace(plan, recompute_by_layer=tuple(policies)) if count else plan

    counts = range(max(stages))
    fits = bisect_left(
        counts, True, key=lambda count: predict_memory(job, recomputing(count), cluster).fits
    )
    return recomputing(fits)


def memory_report(runs: Iterable[Run]) -> list[str]:
    """Lines to print: errors by source beside the null model's, what fits, and the fitted rows."""
    told = [(run, _predict(run)) for run in runs if run.job is not None]
    by_source: dict[str, list[tuple[Run, float]]] = defaultdict(list)
    for run, prediction in told:
        if run.memory_bytes:
            by_source[run.source].append((run, prediction.total.value))
    lines = ["memory               fitted tested   MAPE    max  null model (mean of the fitted)"]
    for source, pairs in by_source.items():
        fitted = [pair for pair in pairs if name_of(pair[0]) in FITTED]
        tested = [pair for pair in pairs if name_of(pair[0]) not in FITTED]
        if tested:
            lines.append(_errors(source, fitted, tested))
    lines += ["", *_fits(told), "", "fitted rows:"]
    names = {name_of(run) for run, _ in told if run.memory_bytes}
    lines += sorted(f"  {name}" for name in FITTED & names)
    return lines


def _predict(run: Run) -> MemoryPrediction:
    cluster = devices_of(run)
    assert run.job is not None
    return predict_memory(run.job, settled(run, cluster), cluster)


def _errors(
    source: str, fitted: Sequence[tuple[Run, float]], tested: Sequence[tuple[Run, float]]
) -> str:
    def error(run: Run, value: float) -> float:
        assert run.memory_bytes is not None
        return abs(value / run.memory_bytes - 1)

    errors = [error(run, value) for run, value in tested]
    mean = fmean(run.memory_bytes or 0 for run, _ in fitted or tested)
    null = fmean(error(run, mean) for run, _ in tested)
    counts = f"{len(fitted):6d} {len(tested):6d}"
    return f"{source:20s} {counts} {fmean(errors):6.1%} {max(errors):6.1%} {null:6.1%}"


def _fits(told: Sequence[tuple[Run, MemoryPrediction]]) -> Iterator[str]:
    """What fits, beside what did."""
    out = [prediction for run, prediction in told if run.out_of_memory]
    ran = [(run, prediction) for run, prediction in told if run.ran]
    open_ = sum(any(word.startswith("recompute") for word in run.assumed) for run, _ in ran)
    yield f"out of memory: {sum(not each.fits for each in out)} of {len(out)} foretold"
    wrong = [run for run, prediction in ran if not prediction.fits]
    yield f"ran: {len(ran) - len(wrong)} of {len(ran)} foretold to fit"
    yield f"     ({open_} of them do not say what they recompute: as few layers as fits)"
    yield from (f"  wrong: {run.source} row {run.row}, {run.model}" for run in wrong)


def fit(runs: Iterable[Run]) -> list[str]:
    """Each source's holes and constant with the least mean absolute error of its fitted rows."""
    by_source: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        if run.job is None or not run.memory_bytes or name_of(run) not in FITTED:
            continue
        lines = _predict(run).lines
        counted = sum(size for name, size in lines.items() if name not in ("libraries", "holes"))
        by_source[run.source].append((counted / GIB, run.memory_bytes / GIB))
    found = []
    for source, pairs in by_source.items():
        # What torch itself reports has no libraries in it.
        constants = [0.0] if source == "torchtitan" else [half / 2 for half in range(17)]
        tried = product(constants, [share / 100 for share in range(46)])
        _, constant, holes = min(
            (fmean(abs((c + (1 + h) * x) / y - 1) for x, y in pairs), c, h) for c, h in tried
        )
        found.append(f"{source}: memory_bytes={constant:g} GiB, holes={holes:g}")
    return found


def main() -> None:
    """Print the report of a table, or fit its constants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="a CSV with the columns of published_runs.csv")
    parser.add_argument("--fit", action="store_true", help="fit the constants again")
    arguments = parser.parse_args()
    runs = read_runs(arguments.table)
    print("\n".join(fit(runs) if arguments.fit else memory_report(runs)))


if __name__ == "__main__":
    main()
