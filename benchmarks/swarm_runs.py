"""One training run of a swarm's method, or of DDP, in one process: for `swarm_loss`, `swarm_liars`.

Real models on Python's standard library, by trainwright's own training code. All peers live in one
process (`swarm.rehearsal`): the global batch of every step is shared out among them, so all methods
see the same tokens in the same order, and contributions go through their codecs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from trainwright.data.batches import Batch
from trainwright.recipe.swarm import CodecName

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
        1_474_560,
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
        589_824,
    ),
}
SEQUENCE, ROWS = 128, 32
POINTS = 8  # of a curve
# Held-out rows: for curves and sweeps (the curves' among them), and others for the table.
CURVE_ROWS, TUNING_ROWS, TEST_ROWS = 64, 256, 512
GRADIENTS = ("demo", "distro")  # that exchange gradients: there is no optimizer inside


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
    momentum: float = 0.0
    codec: CodecName | None = None  # None: the method's own
    rows: int = ROWS  # of a step's batch, of all peers together
    warmup: float = 0.15  # of the steps: so short a run is hurt by less, whatever its method
    final: float = 0.6  # the last learning rate as a share of the peak
    delay: int | None = None  # streaming's τ; None: the method's own. Without it nothing is mixed
    density: float | None = None  # of a sparse codec; None: the method's own

    @property
    def steps(self) -> int:
        """Whole rounds, and fragments, of every method."""
        return max(1, self.tokens // (SEQUENCE * self.rows) // self.unit) * self.unit

    @property
    def unit(self) -> int:
        """Steps after which all peers of every method have exchanged everything."""
        return math.lcm(self.inner_steps, 2, 3)

    @property
    def fragments(self) -> int:
        """Of a method that has them: each is exchanged every `inner_steps` steps."""
        return max(each for each in (1, 2, 3) if self.inner_steps % each == 0)


@cache
def prepared(
    model: str, seed: int, steps: int, rows: int, schedule: tuple[float, float]
) -> tuple[Any, Any, Any]:
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
            "training": {"steps": steps, "batch_sequences": rows},
            "schedule": dict(zip(("warmup", "final"), schedule, strict=True)),
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
        self.recipe, self.data, hf_config = prepared(
            run.model, run.seed, run.steps, run.rows, (run.warmup, run.final)
        )
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
        without = run.method in GRADIENTS
        optimizers = [] if without else build_all_optimizers(self.model, section)
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

        (held_out,) = self.data.validation.values()
        # All rows are shuffled once, alike for all: neighbours are of one document.
        order = torch.randperm(held_out.rows, generator=torch.Generator().manual_seed(0)).tolist()
        rows_of = order[first : first + rows]
        return self.loss_on(
            weights, (held_out.read(rows_of[at : at + 16]) for at in range(0, len(rows_of), 16))
        )

    def loss_on(self, weights: Any, batches: Iterable[Batch]) -> float:
        """Mean loss of some weights on these; the model's own stay."""
        from trainwright.training.micro_batches import score_micro_batches, to_tensors

        own = self.weights()
        self.load(weights)
        self.model.train(False)
        total, targets = 0.0, 0
        for batch in batches:
            tensors = to_tensors(batch, 0, len(batch.input_ids), self.model, None)
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
    share = run.rows // run.peers
    peers = [ModelPeer(run, slice(i * share, (i + 1) * share)) for i in range(run.peers)]
    first = peers[0]
    unit = run.unit
    stops = sorted(
        {unit * round(run.steps / unit * i / POINTS) for i in range(1, POINTS + 1)} - {0}
    )
    rehearsal = None
    if run.method != "ddp":
        settings = replace(DEFAULTS[run.method], outer_learning_rate=run.outer, weight_decay=0.1)
        if settings.inner_steps > 1:
            settings = replace(settings, inner_steps=run.inner_steps)
        if settings.fragments > 1:
            settings = replace(settings, fragments=run.fragments)
        if run.delay is not None:
            mixing = settings.mixing if run.delay else 0.0
            settings = replace(settings, delay=run.delay, mixing=mixing)
        if run.density is not None:
            settings = replace(settings, density=run.density)
        settings = replace(settings, outer_momentum=run.momentum)
        if run.codec:
            settings = replace(settings, codec=run.codec)
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
        curve.append([stop * SEQUENCE * run.rows, first.loss(weights, 0, CURVE_ROWS)])
    return {
        "tuning": first.loss(weights, 0, TUNING_ROWS),
        "loss": first.loss(weights, TUNING_ROWS, TEST_ROWS),
        "curve": curve,
        "parameters": first.layout.count,
        "bytes": rehearsal.bytes / run.peers if rehearsal is not None else 0,
        "seconds": time.process_time() - started,
    }
