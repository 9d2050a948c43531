"""Proof of sameness: a plan's losses and gradients against those of one process.

A small model of the recipe's family trains a few steps on made-up documents, once in one process
and once spread as a plan says, in fp32. Every step's loss and every parameter's whole gradient
(clipped by nothing, but before the update) are compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainwright.comm.local import local
from trainwright.data.batches import IGNORED, Batch
from trainwright.files import write_json
from trainwright.models.decoder import Span
from trainwright.models.families import decoder_config
from trainwright.models.router_balance import balances
from trainwright.models.weights import drawn, initialise, new_model, normal, write_part
from trainwright.objectives.build import build_objective
from trainwright.parallel.gradients import copies
from trainwright.parallel.spread import Model, SpreadModel, spread
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Recipe
from trainwright.training.adapting import adapt, fill, without_adapters
from trainwright.training.assemble import build_all_optimizers
from trainwright.training.reference import Reference, ReferenceModel
from trainwright.training.step import StepStats, TrainStep
from trainwright.training.teacher import Teacher

STEPS, ROWS = 5, 16
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4  # relative; fp32 sums in another order stay below
CLOSE = 3e-6  # a relative difference of router scores that another order of sums may make
SEEDS = 24  # of batches, tried until no router's choice is closer than that


@dataclass(frozen=True)
class Outcome:
    """How far a plan was from one process. `name` is the parameter whose gradient was furthest."""

    plan: Plan
    loss: float  # largest relative difference of a step's loss
    gradient: float  # largest, over steps and parameters, of |difference| / |gradient|
    name: str
    norm: float  # largest relative difference of the global gradient norm
    error: str = ""  # what went wrong, where the plan did not run at all

    @property
    def passed(self) -> bool:
        """Whether all differences are within fp32's rounding."""
        within = self.loss <= LOSS_LIMIT and self.gradient <= GRADIENT_LIMIT
        return not self.error and within and self.norm <= LOSS_LIMIT


def made_batch(step: int, *, rows: int, sequence: int, vocabulary: int, seed: int) -> Batch:
    """Made-up packed documents of uneven lengths, some rows padded, as `Batches` gives them."""
    rng = np.random.default_rng([seed, step])
    input_ids = rng.integers(1, vocabulary, (rows, sequence))
    labels = np.full((rows, sequence), IGNORED, dtype=np.int64)
    positions = np.zeros((rows, sequence), dtype=np.int64)
    segments = np.full((rows, sequence), -1, dtype=np.int32)
    for row in range(rows):
        start, number = 0, 0
        used = sequence if row % 4 else sequence - int(rng.integers(0, sequence // 4))
        while start < used:
            length = min(int(rng.integers(3, sequence)), used - start)
            span = slice(start, start + length)
            positions[row, span] = np.arange(length)
            segments[row, span] = number
            labels[row, start : start + length - 1] = input_ids[row, start + 1 : start + length]
            start, number = start + length, number + 1
        input_ids[row, used:] = 0
    return Batch(input_ids, labels, positions, segments, (("made up",),) * rows)


def made_examples(
    step: int, *, rows: int, sequence: int, vocabulary: int, seed: int, parts: int
) -> Batch:
    """Made-up packed examples of `parts` sequences each, whose prompts are not trained.

    Every row has room left over, and rows differ in how many examples they hold.
    """
    rng = np.random.default_rng([seed, step, parts])
    input_ids = np.zeros((rows, sequence), dtype=np.int64)
    labels = np.full((rows, sequence), IGNORED, dtype=np.int64)
    positions = np.zeros((rows, sequence), dtype=np.int64)
    segments = np.full((rows, sequence), -1, dtype=np.int32)
    names, values = [], np.zeros((rows, sequence), np.float32)
    for row in range(rows):
        start, number = 0, 0
        while start + 4 * parts < sequence:
            most = max(4, min(sequence // (2 * parts), (sequence - start) // parts))
            for length in rng.integers(4, most + 1, parts).tolist():
                span = slice(start, start + length)
                input_ids[row, span] = rng.integers(1, vocabulary, length)
                positions[row, span] = np.arange(length)
                segments[row, span] = number
                prompt = int(rng.integers(1, length - 2))
                trained = slice(start + prompt, start + length - 1)
                labels[row, trained] = input_ids[row, start + prompt + 1 : start + length]
                start, number = start + length, number + 1
        count = number // parts
        values[row, :count] = rng.integers(0, 2, count)
        names.append(("made up",) * count)
    most = max(map(len, names))
    return Batch(input_ids, labels, positions, segments, tuple(names), values[:, :most])


class Trial:
    """A model, spread as a plan says, and what trains it on made-up batches of `rows` rows.

    `batches` is the seed of the batches, beside the recipe's own for everything.
    """

    def __init__(
        self,
        recipe: Recipe,
        hf_config: Mapping[str, Any],
        plan: Plan,
        world: World,
        *,
        rows: int = ROWS,
        batches: int = 0,
    ) -> None:
        config = decoder_config(hf_config)

        def build(span: Span | None) -> Model:
            model = new_model(config, device="meta", span=span)
            adapt(model, recipe.adapter)
            return model

        def write(model: Model) -> None:
            fill(model, recipe.adapter, None, recipe.seed)
            stir(model, recipe.seed)

        def build_still(span: Span | None) -> Model:
            return new_model(config, device="meta", span=span).requires_grad_(False)

        def fill_otherwise(model: Model) -> None:
            initialise(model, recipe.seed + 1)  # type: ignore[arg-type]

        self.recipe, self.plan, self.rows, self.batches = recipe, plan, rows, batches
        self.vocabulary = config.vocab_size
        self.model = spread(build, plan, world, write)
        self.optimizers = build_all_optimizers(self.model, recipe.optimizer)
        objective = build_objective(recipe.objective, self.model.mesh.group("cp"))
        reference: Reference | None = None
        if recipe.objective.kind == "distill":
            reference = Teacher(spread(build_still, plan, world, fill_otherwise))
        elif objective.needs_reference and recipe.adapter is not None:
            reference = ReferenceModel(self.model, partial(without_adapters, self.model.parts))
        elif objective.needs_reference:
            reference = ReferenceModel(spread(build_still, plan, world, fill_otherwise))
        self.step = TrainStep(
            self.model,
            self.optimizers,
            objective,
            recipe.training,
            seed=recipe.seed,
            reference=reference,
        )

    def train(self, index: int) -> StepStats:
        """The step of that number, on this worker's rows of its batch."""
        own = self.plan.rows_of(self.model.mesh.index("data"))
        shape = {
            "rows": self.rows,
            "sequence": self.plan.sequence_length,
            "vocabulary": self.vocabulary,
            "seed": self.recipe.seed + self.batches,
        }
        if self.recipe.learns_examples:
            whole = made_examples(index, **shape, parts=self.recipe.objective.sequences)
        else:
            whole = made_batch(index, **shape)
        batch = rows_of(whole, own)
        return self.step(batch, self.recipe.optimizer.learning_rate, own.start, index=index)


def stir(model: Model, seed: int) -> None:
    """Give adapters' second matrices values: where they are zero, the first ones learn nothing."""
    pieces = getattr(model, "pieces", {})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):
            piece = pieces.get(name)
            shape = piece.whole if piece is not None else tuple(parameter.shape)
            with torch.no_grad():
                write_part(parameter, drawn(f"{seed}:{name}", shape, normal(0.02)), piece)


@dataclass
class Record:
    """What some steps did: `gradients` are each step's, as this worker holds them."""

    model: SpreadModel
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]


def run_steps(trial: Trial, steps: int) -> Record:
    """Train on made-up batches, and keep every whole gradient before it is clipped."""
    gradients: list[dict[str, Tensor]] = []

    def keep_gradients() -> None:
        gradients.append(
            {
                name: local(parameter.grad).detach().clone()
                for name, parameter in trial.model.unique_parameters()
                if parameter.grad is not None
            }
        )

    trial.step.gradients_ready = keep_gradients
    stats = [trial.train(index) for index in range(steps)]
    losses, norms = [each.loss for each in stats], [each.gradient_norm for each in stats]
    return Record(trial.model, losses, norms, gradients)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    segments = batch.segment_ids
    return Batch(
        batch.input_ids[rows],
        batch.labels[rows],
        batch.position_ids[rows],
        None if segments is None else segments[rows],
        batch.documents[rows],
        None if batch.values is None else batch.values[rows],
        None if batch.reference is None else batch.reference[rows],
    )


def write_reference(
    folder: Path, recipe: Recipe, hf_config: Mapping[str, Any], sequence: int, steps: int = STEPS
) -> None:
    """Train in this process alone; its losses, norms and gradients as files for `compare`.

    Where a router's choice hangs on the last bits of its scores, two correct layouts may choose
    differently: of several seeds for the batches the first is taken where none does.
    """
    plan = replace(
        Plan.alone("cpu"),
        micro_batch=ROWS,
        sequence_length=sequence,
        optimizer=recipe.optimizer.name,
    )
    world = World(0, 1, torch.device("cpu"))
    for batches in range(SEEDS):
        trial = Trial(recipe, hf_config, plan, world, batches=batches)
        close_calls = _watch_choices(trial.model)
        record = run_steps(trial, steps)
        if not sum(close_calls):
            break
    for index, tensors in enumerate(record.gradients):
        save_file(tensors, folder / f"gradients-{index}.safetensors")
    values = {"losses": record.losses, "norms": record.norms, "batches": batches}
    write_json(folder / "reference.json", values)


def _watch_choices(model: SpreadModel) -> list[int]:
    """A list that grows with the number of tokens whose experts a small change would change."""
    close_calls: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for router, _ in balances(model.parts):
        choose = router._choose

        def watched(scores: Tensor, choose: Any = choose) -> Tensor:
            chosen: Tensor = choose(scores)
            for _ in range(4):
                noise = 1 + CLOSE * (2 * torch.rand(scores.shape, generator=generator) - 1)
                other = choose(scores * noise)
                differs = chosen.sort(-1).values != other.sort(-1).values
                close_calls.append(int(differs.any(-1).sum()))
            return chosen

        router._choose = watched  # type: ignore[assignment]
    return close_calls


def compare(
    folder: Path, recipe: Recipe, hf_config: Mapping[str, Any], plan: Plan, world: World
) -> Outcome:
    """Train as `plan` says and compare with the reference in `folder`. Collective; equal on all."""
    reference = json.loads((folder / "reference.json").read_text())
    trial = Trial(recipe, hf_config, plan, world, batches=reference["batches"])
    record = run_steps(trial, len(reference["losses"]))
    worst, name = 0.0, ""
    for index, tensors in enumerate(record.gradients):
        with safe_open(folder / f"gradients-{index}.safetensors", framework="pt") as handle:
            found = _gradient_difference(record.model, tensors, handle)
        if found[0] > worst or math.isnan(found[0]):
            worst, name = found
    return Outcome(
        plan,
        _relative(record.losses, reference["losses"]),
        worst,
        name,
        _relative(record.norms, reference["norms"]),
    )


def _gradient_difference(
    model: SpreadModel, gradients: Mapping[str, Tensor], reference: Any
) -> tuple[float, str]:
    """The largest |difference| / |gradient| over all parameters, and whose it is.

    Each worker compares its own boxes; squares are added up over all workers, each box once.
    """
    names = sorted(reference.keys())
    place = {name: index for index, name in enumerate(names)}
    # Squares of differences and of reference values, and elements seen, by parameter.
    sums = torch.zeros(len(names), 3, dtype=torch.float64)
    parameters = dict(model.unique_parameters())
    for name, gradient in gradients.items():
        parameter, piece = parameters[name], model.pieces.get(name)
        offsets = list(piece.offsets) if piece is not None else [0] * gradient.ndim
        if hasattr(parameter, "__create_chunk_list__"):
            (chunk,) = parameter.__create_chunk_list__()
            offsets = [a + b for a, b in zip(offsets, chunk.offsets, strict=True)]
        if not gradient.numel():
            continue
        box = tuple(
            slice(offset, offset + size)
            for offset, size in zip(offsets, gradient.shape, strict=True)
        )
        expected = reference.get_slice(name)[box].double()
        difference = (gradient.double().cpu() - expected).square().sum()
        shares = torch.stack(
            [difference, expected.square().sum(), torch.tensor(float(gradient.numel()))]
        )
        sums[place[name]] += shares / copies(parameter, piece, model.mesh)
    if model.mesh.world.size > 1:
        dist.all_reduce(sums)
    sizes = torch.tensor([math.prod(reference.get_slice(n).get_shape()) for n in names])
    complete = (sums[:, 2] - sizes).abs() < 0.5
    # A parameter that nobody, or not everybody, has a gradient of is as wrong as can be.
    relative = (sums[:, 0] / sums[:, 1].clamp(min=1e-60)).sqrt()
    relative = torch.where(complete, relative, torch.inf)
    silent = complete & (sums[:, 1] == 0) & (sums[:, 0] == 0)
    relative = torch.where(silent, 0.0, relative)
    index = int(relative.argmax())
    return float(relative[index]), names[index]


def _relative(values: Sequence[float], expected: Sequence[float]) -> float:
    differences = [abs(v - e) / abs(e) for v, e in zip(values, expected, strict=True)]
    return max(d if not math.isnan(d) else math.inf for d in differences)
