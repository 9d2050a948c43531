"""What a swarm's methods cost in loss, at equal tokens, against tuned data parallelism.

Every run is one of `swarm_runs`: all methods see the same tokens in the same order. DDP's learning
rate is tuned first, and the share of it that is left in the end; then of every method the outer
learning rate, and the rate inside, for a peer's batch is a fraction of DDP's. A sweep goes on until
its best value is not at its edge; it is of the first seed, on rows that are not those of the table.
The published H (30 and more) and outer momentum (0.9) are for runs of many thousand steps. Here H
is 2: that are 180 rounds, as many as the smallest run of the scaling laws has (Charles et al. 2025:
35 M weights, 20 tokens each, H 30). The momentum is 0, which did best in short runs. τ is 0, for
one step is half of that H already. What other H, τ and densities cost is shown, too, of one seed.

    OMP_NUM_THREADS=1 python benchmarks/swarm_loss.py                 # a 1 M and a 4 M model
    python benchmarks/swarm_loss.py --models 1m --methods diloco noloco --tokens 1_000_000

Every run is written to the results file at once, and not made again: a benchmark that was
interrupted goes on. `--report` trains nothing more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run as a file, too

from benchmarks.swarm_loss_plot import plot
from benchmarks.swarm_runs import GRADIENTS, MODELS, ROWS, SEQUENCE, Run, train
from trainwright.recipe.swarm import CodecName


@dataclass(frozen=True)
class Setup:
    """A row of the table: a method, its peers, and where its sweep begins and how it goes on."""

    name: str
    peers: int
    start: float
    factor: float
    target: str = ""
    inner: float = 1.0  # where the sweep of the rate inside begins, in DDP's
    momentum: float = 0.0  # of the outer step, where the method has one
    codec: CodecName | None = None  # another one than the method's own; not tuned by itself
    delay: int | None = None  # another τ than the method's own

    @property
    def label(self) -> str:
        name = f"{self.name} in {self.codec}" if self.codec else self.name
        own = "" if self.delay is None else f", τ = {self.delay}"
        return "DDP" if name == "ddp" else f"{name}, M = {self.peers}{own}"


SETUPS = (
    Setup("ddp", 1, 4e-3, 1.4),
    Setup("diloco", 1, 1.0, 1.4, "≤ DDP"),
    Setup("diloco", 2, 1.0, 1.4, "≤ DDP + 2 %"),
    Setup("diloco", 4, 1.0, 1.4, "≤ DDP + 4 %", 1.4),
    Setup("streaming", 2, 1.0, 1.4, "≤ DiLoCo + 0.5 %", delay=0),
    Setup("sparseloco", 2, 2.0, 1.4, "≤ DiLoCo + 1 %", 1.4),
    Setup("demo", 2, 0.25, 2.0),
    Setup("demo", 2, 0.25, 2.0, "= DeMo in bf16", codec="fp32"),  # its release's coefficients
    Setup("distro", 2, 0.25, 2.0),
    Setup("noloco", 2, 0.7, 1.4, momentum=0.5),
    Setup("muloco", 2, 1.0, 1.4),
)
DDP = SETUPS[0]
USUAL = ("diloco", "streaming", "sparseloco")


class Results:
    """What has been trained, in a file of JSON lines; and what trains the rest."""

    def __init__(self, file: Path, workers: int, *, only_read: bool) -> None:
        self.file, self.workers, self.only_read = file, workers, only_read
        self.found: dict[Run, dict[str, Any]] = {}
        if file.exists():
            for line in map(json.loads, file.read_text().splitlines()):
                self.found[Run(**line.pop("run"))] = line

    def get(self, run: Run) -> dict[str, Any] | None:
        return self.found.get(run)

    def train(self, runs: Iterable[Run]) -> None:
        """Train those that are missing, the longest first."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.found]
        if not missing:
            return
        if self.only_read:
            raise SystemExit("not all has been trained: leave `--report` out")
        missing.sort(key=lambda run: (run.model != "4m", -run.peers))
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            jobs = {pool.submit(train, run): run for run in missing}
            for number, job in enumerate(as_completed(jobs), start=1):
                run, found = jobs[job], job.result()
                self.found[run] = found
                with self.file.open("a") as file:
                    file.write(json.dumps({"run": asdict(run), **found}) + "\n")
                print(
                    f"{number} of {len(missing)}: {run.model} {run.method} M = {run.peers}, "
                    f"seed {run.seed}, lr {run.rate:g}, outer {run.outer:g}: "
                    f"{found['tuning']:.4f} in {found['seconds']:.0f} s",
                    flush=True,
                )


class Sweep:
    """The tuning of one setup of one model along an axis of `base`: its `rate` (inside), its
    `outer` learning rate, or the `final` share of the rate inside.
    """

    def __init__(self, setup: Setup, base: Run, axis: str, factor: float, most: int) -> None:
        self.setup, self.base, self.axis, self.factor, self.most = setup, base, axis, factor, most
        powers = (0, -1, 1)[: max(1, most)]
        self.values = [getattr(base, axis) * factor**power for power in powers]

    @property
    def model(self) -> str:
        return self.base.model

    def run(self, value: float) -> Run:
        """A run of this setup with that learning rate."""
        value = float(f"{value:.3g}")
        return replace(self.base, **{self.axis: value})  # type: ignore[arg-type]

    def losses(self, results: Results) -> dict[float, float]:
        """What was found, by learning rate."""
        found = {value: results.get(self.run(value)) for value in sorted(self.values)}
        return {value: each["tuning"] for value, each in found.items() if each is not None}

    def best(self, results: Results) -> Run:
        """The run of the least loss."""
        return self.run(self._best(results))

    def widen(self, results: Results) -> bool:
        """Go on beyond the edge where the best value is; whether there is something to train."""
        best, factor = self._best(results), self.factor
        if len(self.values) >= self.most or min(self.values) < best < max(self.values):
            return False
        value = best * factor if best == max(self.values) else best / factor
        if self.axis == "final" and value > 1:
            return False  # the rate would grow again
        self.values.append(value)
        return True

    def _best(self, results: Results) -> float:
        losses = self.losses(results)
        return min(losses, key=lambda value: losses[value] if math.isfinite(losses[value]) else 99)

    def line(self, results: Results) -> str:
        """A line of the table of sweeps."""
        best = self._best(results)
        listed = ", ".join(
            f"**{value:.3g}: {loss:.4f}**" if value == best else f"{value:.3g}: {loss:.4f}"
            for value, loss in self.losses(results).items()
        )
        what = {"rate": "inner", "outer": "outer", "final": "final share"}[self.axis]
        tokens = f"{self.base.tokens:,}"
        return f"| {self.model} | {tokens} | {self.setup.label} | {what} | {listed} |"


def tune(sweeps: Sequence[Sweep], results: Results) -> None:
    """All sweeps side by side, until each has its best value inside."""
    open_sweeps = list(sweeps)
    while open_sweeps:
        results.train(s.run(value) for s in open_sweeps for value in s.values)
        open_sweeps = [sweep for sweep in open_sweeps if sweep.widen(results)]


Tuned = dict[tuple[str, Setup], Run]  # by model
Change = dict[str, float]  # of fields of a run

# What is changed in a tuned run, by method and peers; a lower density goes with a higher rate.
VARIATIONS: dict[tuple[str, int], tuple[Change, ...]] = {
    ("diloco", 2): ({"inner_steps": 6},),
    ("diloco", 4): ({"inner_steps": 1}, {"inner_steps": 3}, {"inner_steps": 6}),
    ("streaming", 2): ({"delay": 1}, {"inner_steps": 6, "delay": 1}),
    ("sparseloco", 2): ({"density": 1 / 16, "outer": 1.0}, {"density": 1 / 4, "outer": 1.0}),
}
SHOWN = {"inner_steps": "H", "delay": "τ", "density": "density", "outer": "outer rate"}


def variations(tuned: Tuned, model: str) -> list[tuple[Setup, Change, Run]]:
    """Every changed run of a model's first seed, after the tuned one that it comes from."""
    found: list[tuple[Setup, Change, Run]] = []
    for (of, setup), run in tuned.items():
        changes = VARIATIONS.get((setup.name, setup.peers), ()) if of == model else ()
        if changes:
            found.append((setup, {}, run))
        found += [(setup, each, replace(run, **each)) for each in changes]  # type: ignore[arg-type]
    return found


def tuned(
    setups: Sequence[Setup], results: Results, options: argparse.Namespace
) -> tuple[Tuned, list[Sweep]]:
    """The best run of every setup (of seed 0), and the sweeps that found it.

    Of the first model: DDP's learning rate and where it ends, then the methods' outer ones, and
    then those inside, where a peer's batch is not DDP's. The best outer learning rate hangs on M
    and H and hardly on the size (Charles et al. 2025, figure 7), so all models have that one, and
    inside the same multiple of DDP's, which is tuned for each.
    """
    most, first = options.sweep_most, options.models[0]
    own = [setup for setup in setups if setup != DDP and not setup.codec]
    found: Tuned = {}
    sweeps: list[Sweep] = []

    def best(new: Sequence[Sweep]) -> dict[Setup, Run]:
        tune(new, results)
        sweeps.extend(new)
        return {each.setup: each.best(results) for each in new}

    def run(setup: Setup, model: str, tokens: int, rate: float, outer: float) -> Run:
        names = (model, setup.name, setup.peers, options.inner_steps, tokens)
        rate, outer = float(f"{rate:.3g}"), outer if setup != DDP else 0.0
        run = Run(*names, rate, outer, 0, setup.momentum, setup.codec, options.rows)
        return replace(run, delay=setup.delay, final=final)

    def ddp(model: str, tokens: int) -> Sweep:
        return Sweep(DDP, run(DDP, model, tokens, DDP.start, 0.0), "rate", DDP.factor, most)

    length, final = options.tokens or MODELS[first][2], Run.final
    base = best([ddp(first, length)])[DDP]
    base = best([Sweep(DDP, base, "final", 1 / 0.6, most)])[DDP]
    final = base.final  # of all runs from here on
    starts = {each: run(each, first, length, base.rate * each.inner, each.start) for each in own}
    chosen = best([Sweep(each, starts[each], "outer", each.factor, most) for each in own])
    fixed = (*GRADIENTS, "streaming")  # one rate is all there is; as DiLoCo's
    inside = [each for each in own if each.name not in fixed and each.peers > 1]
    chosen |= best([Sweep(each, chosen[each], "rate", 1.4, most) for each in inside])
    for each in own:
        like = next((o for o in own if (o.name, o.peers) == ("diloco", each.peers)), each)
        if each.name == "streaming":
            chosen[each] = replace(chosen[each], rate=chosen[like].rate)
    for model in options.models:
        tokens = options.tokens or MODELS[model][2]
        top = base if model == first else best([ddp(model, tokens)])[DDP]
        found[model, DDP] = top
        for each in own:
            rate = top.rate * chosen[each].rate / base.rate
            found[model, each] = run(each, model, tokens, rate, chosen[each].outer)
        for each in setups:
            if each.codec:
                (like,) = (o for o in own if (o.name, o.peers) == (each.name, each.peers))
                found[model, each] = replace(found[model, like], codec=each.codec)
    return found, sweeps


def report(
    tuned: Tuned,
    sweeps: Sequence[Sweep],
    results: Results,
    setups: Sequence[Setup],
    options: argparse.Namespace,
) -> None:
    """Sweeps, table, and a plot for each model."""
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}")
    print(f"Batches of {options.rows} × {SEQUENCE} tokens, H = {options.inner_steps}.\n")
    print("Sweeps, held-out loss of one seed:\n")
    print("| model | tokens | method | which | learning rate: loss |\n|---|---|---|---|---|")
    for sweep in sweeps:
        print(sweep.line(results))
    varied = variations(tuned, options.models[0])
    if varied:
        print(
            f"\nWith other settings, at the same rates: {options.models[0]}, held-out loss ", end=""
        )
        print("of one seed:\n\n| method | changed | loss | |\n|---|---|---|---|")
    for setup, change, run in varied:
        loss = results.found[run]["tuning"]
        what = ", ".join(f"{SHOWN[name]} {fraction(value)}" for name, value in change.items())
        if not change:
            usual = loss
        above = f"{100 * (loss / usual - 1):+.1f} %" if change else ""
        print(f"| {setup.label} | {what or '–'} | {loss:.4f} | {above} |")
    print(f"\nHeld-out loss on other rows, mean ± sd of {options.seeds} seeds; ", end="")
    print("gaps of equal seeds:\n")
    print(
        "| model | tokens | method | inner, outer rate, momentum | loss | above DDP "
        "| above equal M | wanted | sent by a peer |\n|---|---|---|---|---|---|---|---|---|"
    )
    for model in options.models:
        own = {setup: tuned[model, setup] for setup in setups}
        found = {
            setup: [results.found[run] for run in of_seeds(run, options.seeds)]
            for setup, run in own.items()
        }
        for setup, runs in found.items():
            peer = Setup("demo" if setup.codec else "diloco", setup.peers, 0, 0)
            same = [
                other
                for each, other in found.items()
                if (each.name, each.peers, each.codec) == (peer.name, peer.peers, None)
                and each != setup
            ]
            run, (one, *_) = own[setup], runs
            print(
                f"| {model} ({one['parameters']:,}) | {run.steps * SEQUENCE * run.rows:,} "
                f"| {setup.label} | {run.rate:g}, {run.outer:g}, {run.momentum:g} "
                f"| {spread_of([run['loss'] for run in runs], '.4f')} "
                f"| {gap(runs, found[DDP]) if setup != DDP else '–'} "
                f"| {gap(runs, same[0]) if same and setup != DDP else '–'} "
                f"| {setup.target or '–'} | {one['bytes'] / 1e6:,.2f} MB |"
            )
        if len(found) > 1:
            file = options.plot.with_stem(f"{options.plot.stem}-{model}")
            plot(file, model, {setup.label: runs for setup, runs in found.items()})
            print(f"(plot: {file})", flush=True)
    seconds = sum(each["seconds"] for each in results.found.values())
    print(f"\n{len(results.found)} runs, {seconds / 60:,.0f} minutes of one core.")


def fraction(value: float) -> str:
    """A number, or 1/n."""
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


def of_seeds(run: Run, seeds: int) -> list[Run]:
    """The same with each seed."""
    return [replace(run, seed=seed) for seed in range(seeds)]


def spread_of(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean ± standard deviation."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}}{unit} ± {sd:{form.lstrip('+')}}{unit}"


def gap(runs: Sequence[dict], others: Sequence[dict]) -> str:
    """How much the loss is above others', seed by seed."""
    ratios = [run["loss"] / other["loss"] for run, other in zip(runs, others, strict=True)]
    return spread_of([100 * (ratio - 1) for ratio in ratios], "+.2f", " %")


def main() -> None:
    """Tune, train the seeds, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1m", "4m"])
    parser.add_argument("--methods", nargs="+", choices=[s.name for s in SETUPS], default=USUAL)
    parser.add_argument("--tokens", type=int, help="of a run; default by model")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a step's batch, of all peers")
    parser.add_argument("--inner-steps", type=int, default=2, help="H of methods that have one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep-most", type=int, default=5, help="most values of a sweep")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a core each")
    parser.add_argument("--report", action="store_true", help="train nothing more")
    parser.add_argument("--results", type=Path, default=Path("swarm_loss.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("swarm_loss.svg"))
    options = parser.parse_args()

    from trainwright.training.launch import MALLOC

    os.environ |= {**MALLOC, "OMP_NUM_THREADS": "1"}  # of the workers
    results = Results(options.results, options.workers, only_read=options.report)
    setups = [setup for setup in SETUPS if setup.name in {"ddp", *options.methods}]
    best, sweeps = tuned(setups, results, options)
    runs = [run for each in best.values() for run in of_seeds(each, options.seeds)]
    results.train([*runs, *(run for *_, run in variations(best, options.models[0]))])
    report(best, sweeps, results, setups, options)


if __name__ == "__main__":
    main()
