"""What a swarm's methods cost in loss, at equal tokens, against tuned data parallelism.

Real models on Python's standard library, by trainwright's own training code. All peers live in one
process (`swarm.rehearsal`): the global batch of every step is shared out among them, so all methods
see the same tokens in the same order, and contributions go through their codecs. DDP's learning
rate is tuned first; every method then has that rate inside, and its outer learning rate is tuned.
A sweep goes on until its best value is not at its edge; it is of the first seed, on rows that are
not those of the table. The published H (30 and more) and outer momentum (0.9) are for runs of many
hundreds of rounds; these have tens, hence an H of 10 and a momentum of 0.5 unless told otherwise.

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
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Vocabulary, shape, and tokens of a run.
MODELS: dict[str, tuple[int, dict[str, Any], int]] = {
    "1m": (
        2048,
        {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        368_640,
    ),
    "4m": (
        4096,
        {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        184_320,
    ),
}
SEQUENCE, ROWS = 128, 4
POINTS = 8  # of a curve
# Held-out rows: for curves and sweeps (the curves' among them), and others for the table.
CURVE_ROWS, TUNING_ROWS, TEST_ROWS = 64, 256, 512


@dataclass(frozen=True)
class Setup:
    """A row of the table: a method, its peers, and where its sweep begins and how it goes on."""

    name: str
    peers: int
    start: float
    factor: float
    target: str = ""

    @property
    def label(self) -> str:
        return "DDP" if self.name == "ddp" else f"{self.name}, M = {self.peers}"


SETUPS = (
    Setup("ddp", 1, 2e-3, 2.0),
    Setup("diloco", 1, 0.7, 1.4, "≤ DDP"),
    Setup("diloco", 2, 0.7, 1.4, "≤ DDP + 2 %"),
    Setup("diloco", 4, 0.7, 1.4, "≤ DDP + 4 %"),
    Setup("streaming", 2, 0.7, 1.4, "≤ DiLoCo + 0.5 %"),
    Setup("sparseloco", 2, 1.0, 1.4, "≤ DiLoCo + 1 %"),
    Setup("demo", 2, 0.25, 2.0),
    Setup("distro", 2, 0.25, 2.0),
    Setup("noloco", 2, 0.7, 1.4),
    Setup("muloco", 2, 0.7, 1.4),
)
NESTEROV = ("diloco", "streaming", "muloco")
USUAL = ("ddp", "diloco", "streaming", "sparseloco", "demo")


@dataclass(frozen=True)
class Run:
    """One training run; what is not here is the same for all."""

    model: str
    method: str
    peers: int
    inner_steps: int
    tokens: int
    rate: float  # the inner learning rate's peak
    outer: float  # the outer learning rate; 0 for DDP
    seed: int
    momentum: float = 0.0  # of the outer step, in methods that have one

    @property
    def steps(self) -> int:
        """Whole rounds, and fragments, of every method."""
        unit = math.lcm(self.inner_steps, 3)
        return max(1, self.tokens // (SEQUENCE * ROWS) // unit) * unit


# In a worker


@cache
def prepared(model: str, seed: int, steps: int) -> tuple[Any, Any, Any]:
    """Recipe, data and Hugging Face config of a model."""
    from trainwright.data.prepare import prepare_data
    from trainwright.recipe.schema import Recipe
    from trainwright.training.prepare import choose_model_config

    vocabulary, shape, _ = MODELS[model]
    recipe = Recipe.model_validate(
        {
            "name": "swarm-loss",
            "seed": seed,
            "model": {"family": "llama", "config": shape},
            "tokenizer": {"train": {"vocab_size": vocabulary}},
            "data": {
                "sources": ["python-stdlib"],
                "sequence_length": SEQUENCE,
                "validation": 0.05,
            },
            "training": {"steps": steps, "batch_sequences": ROWS},
        }
    )
    data = prepare_data(recipe)
    return recipe, data, choose_model_config(recipe, None, data.vocabulary, data.pad_id)


class ModelPeer:
    """`swarm.rehearsal.Trainee`: a model with its optimizer, and its rows of every global batch."""

    def __init__(self, run: Run, rows: slice) -> None:
        import torch

        from trainwright.models.families import decoder_config
        from trainwright.models.weights import initialise, new_model
        from trainwright.objectives.build import build_objective
        from trainwright.parallel.spread import spread
        from trainwright.parallel.world import World
        from trainwright.planner.plan import Plan
        from trainwright.swarm.layout import Layout
        from trainwright.training.assemble import build_all_optimizers
        from trainwright.training.step import TrainStep

        self.run, self.rows = run, rows
        self.recipe, self.data, hf_config = prepared(run.model, run.seed, run.steps)
        config = decoder_config(hf_config)
        plan = replace(
            Plan.alone("cpu"),
            micro_batch=rows.stop - rows.start,
            sequence_length=SEQUENCE,
            precision="bf16",
        )
        self.model = spread(
            lambda span: new_model(config, device="meta", span=span),
            plan,
            World(0, 1, torch.device("cpu")),
            lambda model: initialise(model, self.recipe.seed),  # type: ignore[arg-type]
        )
        self.objective = build_objective(self.recipe.objective, None)
        name = "muon" if run.method == "muloco" else "adamw"
        section = self.recipe.optimizer.model_copy(update={"name": name})
        # Methods that exchange gradients have no optimizer inside.
        gradients = run.method in ("demo", "distro")
        optimizers = [] if gradients else build_all_optimizers(self.model, section)
        self.train_step = TrainStep(
            self.model, optimizers, self.objective, self.recipe.training, seed=self.recipe.seed
        )
        self.parameters = dict(self.model.unique_parameters())
        self.layout = Layout.of(self.parameters)

    def rate(self, step: int) -> float:
        """The inner learning rate of a step."""
        from trainwright.optim.schedules import learning_rate

        return learning_rate(step, self.run.steps, self.run.rate, self.recipe.schedule)

    def load(self, weights: Any) -> None:
        import torch

        parts = self.layout.unflatten(weights)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(parts[name])

    def weights(self) -> Any:
        return self.layout.flatten(self.parameters)

    def train(self, step: int) -> int:
        batch = self.data.train.batch(step, self.rows)
        return self.train_step(batch, self.rate(step), self.rows.start, index=step).targets

    def gradient(self, step: int) -> tuple[Any, int]:
        tokens = self.train(step)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        found = self.layout.flatten(gradients)
        for parameter in self.parameters.values():
            parameter.grad = None
        return found, tokens

    def loss(self, weights: Any, first: int, rows: int) -> float:
        """Mean held-out loss of some weights over so many rows."""
        import torch

        from trainwright.training.micro_batches import score_micro_batches, to_tensors

        own = self.weights()
        self.load(weights)
        self.model.train(False)
        (held_out,) = self.data.validation.values()
        # All rows are shuffled once, alike for all: neighbours are of one document.
        order = torch.randperm(held_out.rows, generator=torch.Generator().manual_seed(0)).tolist()
        total, targets = 0.0, 0
        for start in range(first, min(first + rows, held_out.rows), 16):
            batch = held_out.read(order[start : min(start + 16, first + rows)])
            tensors = to_tensors(batch, 0, 16, self.model, None)
            ((sums, _),) = score_micro_batches(self.model, self.objective, [tensors])
            total += float(sums["targets"])
            targets += batch.weight
        self.model.train(True)
        self.load(own)
        return total / targets


def train(run: Run) -> dict[str, Any]:
    """Losses on the way and in the end, bytes of a peer's contributions, and the core's seconds."""
    import torch

    from trainwright.swarm.methods.build import build_method
    from trainwright.swarm.rehearsal import Rehearsal
    from trainwright.swarm.settings import DEFAULTS

    torch.set_num_threads(1)
    started = time.process_time()
    share = ROWS // run.peers
    peers = [ModelPeer(run, slice(i * share, (i + 1) * share)) for i in range(run.peers)]
    first = peers[0]
    unit = math.lcm(run.inner_steps, 3)
    stops = sorted(
        {unit * round(run.steps / unit * i / POINTS) for i in range(1, POINTS + 1)} - {0}
    )
    rehearsal = None
    if run.method != "ddp":
        settings = replace(DEFAULTS[run.method], outer_learning_rate=run.outer, weight_decay=0.1)
        if settings.inner_steps > 1:
            settings = replace(settings, inner_steps=run.inner_steps)
        if run.method in NESTEROV:
            settings = replace(settings, outer_momentum=run.momentum)
        rehearsal = Rehearsal(
            build_method(settings, first.layout),
            {f"peer {index}": peer for index, peer in enumerate(peers)},
            first.weights(),
            rate=first.rate,
            seed=run.seed,
        )

    curve, done = [], 0
    for stop in stops:
        if rehearsal is None:
            for step in range(done, stop):
                first.train(step)
            weights = first.weights()
        else:
            rehearsal.run(stop)
            # Where peers do not agree, it is the mean of what they have.
            weights = torch.stack([each.weights for each in rehearsal.agreed.values()]).mean(0)
        done = stop
        curve.append([stop * SEQUENCE * ROWS, first.loss(weights, 0, CURVE_ROWS)])
    return {
        "tuning": first.loss(weights, 0, TUNING_ROWS),
        "loss": first.loss(weights, TUNING_ROWS, TEST_ROWS),
        "curve": curve,
        "parameters": first.layout.count,
        "bytes": rehearsal.bytes / run.peers if rehearsal is not None else 0,
        "seconds": time.process_time() - started,
    }


# The whole of it


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

    def train(self, runs: Iterable[Run]) -> bool:
        """Train those that are missing, the longest first; whether all are there now."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.found]
        if not missing or self.only_read:
            return not missing
        missing.sort(key=lambda run: (run.model != "4m", run.peers))
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
        return True


class Sweep:
    """The tuning of one setup of one model."""

    def __init__(self, setup: Setup, base: Run, most: int, start: float | None = None) -> None:
        self.setup, self.base, self.most = setup, base, most
        first = setup.start if start is None else start
        powers = (0, -1, 1)[: max(1, most)]
        self.values = [first * setup.factor**power for power in powers]

    @property
    def model(self) -> str:
        return self.base.model

    def run(self, value: float, seed: int | None = None) -> Run:
        """A run of this setup with that learning rate, the inner one for DDP."""
        value = float(f"{value:.3g}")
        ddp = self.setup.name == "ddp"
        run = replace(self.base, rate=value) if ddp else replace(self.base, outer=value)
        return run if seed is None else replace(run, seed=seed)

    def losses(self, results: Results) -> dict[float, float]:
        """What was found, by learning rate."""
        found = {value: results.get(self.run(value)) for value in sorted(self.values)}
        return {value: each["tuning"] for value, each in found.items() if each is not None}

    def best(self, results: Results) -> float:
        """The learning rate of the least loss."""
        losses = self.losses(results)
        return min(losses, key=lambda value: losses[value] if math.isfinite(losses[value]) else 99)

    def widen(self, results: Results) -> bool:
        """Go on beyond the edge where the best value is; whether there is something to train."""
        best, factor = self.best(results), self.setup.factor
        if len(self.values) >= self.most or min(self.values) < best < max(self.values):
            return False
        self.values.append(best * factor if best == max(self.values) else best / factor)
        return True


def tune(sweeps: Sequence[Sweep], results: Results) -> bool:
    """All sweeps side by side, until each has its best value inside; False without all results."""
    open_sweeps = list(sweeps)
    while open_sweeps:
        if not results.train(s.run(value) for s in open_sweeps for value in s.values):
            return False
        open_sweeps = [sweep for sweep in open_sweeps if sweep.widen(results)]
    return True


def tuned(setups: Sequence[Setup], results: Results, options: argparse.Namespace) -> list[Sweep]:
    """DDP's learning rates first, by model; with them inside, the outer ones of all methods.

    The best outer learning rate hangs on M and H and hardly on the size (Charles et al. 2025,
    figure 7): without `--sweep-all` the first model's serve the others.
    """
    found: list[Sweep] = []
    most = options.sweep_most
    first, *others = options.models
    rates: dict[str, float] = {}
    outer: dict[Setup, float] = {}

    def sweep(model: str, setup: Setup, most: int) -> Sweep:
        tokens = options.tokens or MODELS[model][2]
        names = (model, setup.name, setup.peers, options.inner_steps, tokens)
        momentum = options.outer_momentum if setup.name in NESTEROV else 0.0
        base = Run(*names, rates.get(model, 0.0), 0.0, 0, momentum)
        return Sweep(setup, base, most, outer.get(setup))

    def carry_out(new: list[Sweep]) -> None:
        if not tune(new, results):
            raise SystemExit("not all has been trained: leave `--report` out")
        found.extend(new)

    carry_out([sweep(model, SETUPS[0], most) for model in options.models])
    rates |= {each.model: each.run(each.best(results)).rate for each in found}
    methods = [setup for setup in setups if setup.name != "ddp"]
    carry_out([sweep(first, setup, most) for setup in methods])
    if not options.sweep_all:
        outer |= {each.setup: each.best(results) for each in found if each.setup.name != "ddp"}
    most = most if options.sweep_all else 1
    carry_out([sweep(model, setup, most) for model in others for setup in methods])
    return found


def report(
    sweeps: Sequence[Sweep], results: Results, seeds: Sequence[int], options: argparse.Namespace
) -> None:
    """Sweeps, table, and a plot for each model."""
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}")
    print(f"Batches of {ROWS} × {SEQUENCE} tokens, H = {options.inner_steps}, ", end="")
    print(f"outer momentum {options.outer_momentum:g}.\n")
    print(
        "Sweeps (DDP: its learning rate; the others: the outer one), held-out loss of one seed:\n"
    )
    print("| model | method | learning rate: loss |\n|---|---|---|")
    for sweep in sweeps:
        best = sweep.best(results)
        listed = ", ".join(
            f"**{value:.3g}: {loss:.4f}**" if value == best else f"{value:.3g}: {loss:.4f}"
            for value, loss in sweep.losses(results).items()
        )
        print(f"| {sweep.model} | {sweep.setup.label} | {listed} |")
    print(f"\nHeld-out loss on other rows, mean ± sd of {len(seeds)} seeds; gaps of equal seeds:\n")
    print("| model | method | loss | above DDP | above DiLoCo, equal M | wanted | sent by a peer |")
    print("|---|---|---|---|---|---|---|")
    for model in options.models:
        own = [sweep for sweep in sweeps if sweep.model == model]
        found = {
            s.setup: [results.found[s.run(s.best(results), seed)] for seed in seeds] for s in own
        }
        ddp = next(runs for setup, runs in found.items() if setup.name == "ddp")
        for setup, runs in found.items():
            same = [
                other
                for each, other in found.items()
                if (each.name, each.peers) == ("diloco", setup.peers) and each != setup
            ]
            versus = gap(runs, same[0]) if same and setup.name != "ddp" else "–"
            print(
                f"| {model} ({runs[0]['parameters']:,}) | {setup.label} "
                f"| {spread_of([run['loss'] for run in runs], '.4f')} "
                f"| {gap(runs, ddp) if setup.name != 'ddp' else '–'} | {versus} "
                f"| {setup.target or '–'} | {runs[0]['bytes'] / 1e6:,.2f} MB |"
            )
        if len(found) > 1:
            plot(options.plot.with_stem(f"{options.plot.stem}-{model}"), model, found)
    seconds = sum(each["seconds"] for each in results.found.values())
    print(f"\n{len(results.found)} runs, {seconds / 60:,.0f} minutes of one core.")


def spread_of(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean ± standard deviation."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}}{unit} ± {sd:{form.lstrip('+')}}{unit}"


def gap(runs: Sequence[dict], others: Sequence[dict]) -> str:
    """How much the loss is above others', seed by seed."""
    ratios = [run["loss"] / other["loss"] for run, other in zip(runs, others, strict=True)]
    return spread_of([100 * (ratio - 1) for ratio in ratios], "+.2f", " %")


def plot(file: Path, model: str, found: dict[Setup, list[dict]]) -> None:
    """An SVG of each method's loss above DDP's, in percent, over the tokens seen."""
    from trainwright.report.plots import Line, line_chart

    colours = (
        "#4269d0",
        "#efb118",
        "#ff725c",
        "#3ca951",
        "#a463f2",
        "#6cc5b0",
        "#97bbf5",
        "#9c6b4e",
        "#9498a0",
    )
    ddp = next(runs for setup, runs in found.items() if setup.name == "ddp")
    others = {setup: runs for setup, runs in found.items() if setup.name != "ddp"}
    lines = []
    for number, (setup, runs) in enumerate(others.items()):
        tokens = [point[0] / 1000 for point in runs[0]["curve"]]
        above = [
            100
            * statistics.mean(
                run["curve"][place][1] / base["curve"][place][1] - 1
                for run, base in zip(runs, ddp, strict=True)
            )
            for place in range(len(tokens))
        ]
        lines.append(Line(setup.label, tokens, above, "points", number))
    drawing = line_chart(
        lines,
        x_title="thousand tokens",
        y_title=f"{model}: held-out loss above DDP (%)",
        width=760,
        height=380,
    )
    # The page's style sheet has five colours, and there is no page: each series gets its own here.
    legend: list[str] = []
    at = -1
    for colour, line in zip(colours, lines, strict=False):
        at = drawing.index('class="line', at + 1)
        drawing = drawing[:at] + f'style="stroke:{colour}" ' + drawing[at:]
        at += len(colour) + 20
        y = 24 + 16 * len(legend)
        legend.append(f'<text x="770" y="{y}" style="fill:{colour}">{line.label}</text>')
    style = (
        "<style>text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#333}"
        ".line{fill:none;stroke-width:2}.dot{display:none}.at{display:none}</style>"
        '<rect width="100%" height="100%" fill="white"/>'
    )
    head, rest = drawing.replace("0 0 760 380", "0 0 900 380").split(">", 1)  # room for names
    head += ' xmlns="http://www.w3.org/2000/svg"'
    file.write_text(f"{head}>{style}{rest[: rest.rindex('</svg>')]}{''.join(legend)}</svg>\n")
    print(f"(plot: {file})", flush=True)


def main() -> None:
    """Tune, train the seeds, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1m", "4m"])
    parser.add_argument("--methods", nargs="+", choices=[s.name for s in SETUPS], default=USUAL)
    parser.add_argument("--tokens", type=int, help="of a run; default by model")
    parser.add_argument("--inner-steps", type=int, default=10, help="H of methods that have one")
    parser.add_argument("--outer-momentum", type=float, default=0.5, help="of Nesterov's SGD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep-most", type=int, default=4, help="most values of a sweep")
    parser.add_argument("--sweep-all", action="store_true", help="sweep every model by itself")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a core each")
    parser.add_argument("--report", action="store_true", help="train nothing more")
    parser.add_argument("--results", type=Path, default=Path("swarm_loss.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("swarm_loss.svg"))
    options = parser.parse_args()

    from trainwright.training.launch import MALLOC

    os.environ |= {**MALLOC, "OMP_NUM_THREADS": "1"}  # of the workers
    results = Results(options.results, options.workers, only_read=options.report)
    seeds = list(range(options.seeds))
    setups = [setup for setup in SETUPS if setup.name in {"ddp", *options.methods}]
    sweeps = tuned(setups, results, options)
    if not results.train(s.run(s.best(results), seed) for s in sweeps for seed in seeds):
        raise SystemExit("not all has been trained: leave `--report` out")
    report(sweeps, results, seeds, options)


if __name__ == "__main__":
    main()
