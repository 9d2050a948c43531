"""From a run directory to a trainer that is ready to run: model, optimizers, data, hooks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainwright.checkpoint.state import State, load_training_state, training_tensors
from trainwright.checkpoint.store import CheckpointStore
from trainwright.data.prepare import PreparedData, open_data
from trainwright.models.decoder import Span
from trainwright.models.fallback import load_fallback
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.models.weights import new_model
from trainwright.objectives.build import build_objective
from trainwright.objectives.objective import Objective
from trainwright.optim.held import HeldGradients
from trainwright.optim.optimizers import build_optimizers
from trainwright.parallel.precision import COMPUTE_DTYPES
from trainwright.parallel.spread import Model, SpreadModel, spread
from trainwright.parallel.whole_matrices import WholePieces
from trainwright.parallel.world import World
from trainwright.planner.beside import plan_beside
from trainwright.planner.plan import Plan
from trainwright.planner.shapes import flops_per_token, parameter_count
from trainwright.recipe.schema import Adapter, ModelSection, Recipe
from trainwright.recipe.schema import Optimizer as OptimizerSection
from trainwright.recipe.swarm import GRADIENT_METHODS
from trainwright.training.adapting import (
    adapt,
    fill,
    fill_adapter_alone,
    narrow_frozen,
    rate_factors,
    without_adapters,
)
from trainwright.training.calibrate import peak_flops
from trainwright.training.hooks import CheckpointHook, EvaluationHook, MetricsHook
from trainwright.training.loop import Hook, Trainer
from trainwright.training.machine import usable_cores
from trainwright.training.metrics import MetricsWriter
from trainwright.training.prepare import pretrained_directory, total_steps
from trainwright.training.progress import Progress
from trainwright.training.reference import CachedReference, Reference, ReferenceModel
from trainwright.training.reference_cache import take_reference
from trainwright.training.run_directory import RunDirectory
from trainwright.training.step import TrainStep
from trainwright.training.swarm_file import Joined
from trainwright.training.teacher import Teacher

if TYPE_CHECKING:
    from trainwright.training.swarm_peer import PeerTrainer


@dataclass
class Assembled:
    """A trainer with what must be closed after it."""

    trainer: Trainer
    store: CheckpointStore
    writer: MetricsWriter | None
    progress: Progress | None
    started: float
    swarm: PeerTrainer | None = None

    def close(self, done: int) -> None:
        """Wait for the last checkpoint and end the records."""
        self.store.wait()
        self.store.close()
        if self.swarm is not None:
            self.swarm.close()
        seconds = time.time() - self.started
        if self.writer is not None:
            self.writer.write({"kind": "end", "step": done, "seconds": seconds})
            self.writer.close()
        if self.progress is not None:
            self.progress.finish({"step": done, "seconds": seconds})


def build_model(run: RunDirectory, recipe: Recipe, plan: Plan, world: World) -> SpreadModel:
    """The recipe's model, its initial weights in place, spread as the plan says."""
    directory = pretrained_directory(recipe.model)
    return _built(run.read_model_config(), directory, recipe, plan, world)


def build_reference(
    run: RunDirectory, recipe: Recipe, plan: Plan, world: World, policy: SpreadModel
) -> Reference:
    """What `policy` is compared with: itself without its adapter, or a second model, not trained.

    That is the reference or teacher which the recipe names, or the policy's own beginning.
    """
    named = recipe.objective.teacher or recipe.objective.reference
    if recipe.adapter is not None and named is None:
        return ReferenceModel(policy, partial(without_adapters, policy.parts))
    hf_config = run.read_model_config()
    directory = pretrained_directory(recipe.model)
    if named is not None:
        directory = pretrained_directory(ModelSection(path=named))
        assert directory is not None
        hf_config = json.loads((directory / "config.json").read_text())
    config = decoder_config(hf_config) if hf_config["model_type"] in FAMILIES else None
    own_plan = plan_beside(plan, config)
    spread_model = _built(hf_config, directory, recipe, own_plan, world, trained=False)
    spread_model.train(False)
    return Teacher(spread_model) if recipe.objective.teacher else ReferenceModel(spread_model)


def what_is_optimised(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    world: World,
    policy: SpreadModel,
    data: PreparedData | None = None,
) -> tuple[Objective, Reference | None]:
    """The recipe's objective, and what it compares `policy` with, if anything.

    Where the recipe wants a reference asked once, the batches of `data` are given all it says.
    """
    objective = build_objective(recipe.objective, policy.mesh.group("cp"))
    if not objective.needs_reference:
        return objective, None

    def build() -> Reference:
        return build_reference(run, recipe, plan, world, policy)

    if data is None or not recipe.objective.cache_reference:
        return objective, build()
    say = Progress().say if world.is_first else lambda message: None
    take_reference(data, recipe, run.read_model_config(), plan, world, build, say)
    return objective, CachedReference()


def _built(
    hf_config: dict,
    directory: Path | None,
    recipe: Recipe,
    plan: Plan,
    world: World,
    *,
    trained: bool = True,
) -> SpreadModel:
    adapter = recipe.adapter if trained else None
    keeps = recipe.objective.needs_reference and recipe.objective.reference is None

    def build(span: Span | None) -> Model:
        if hf_config["model_type"] in FAMILIES:
            decoder = new_model(decoder_config(hf_config), device="meta", span=span)
            adapt(decoder, adapter, keep_originals=keeps)
            freeze(decoder, recipe.training.freeze if trained else ["*"])
            if adapter is not None or not trained:
                narrow_frozen(decoder, COMPUTE_DTYPES[plan.precision])
            return decoder
        assert directory is not None
        model = load_fallback(directory, trust_remote_code=recipe.model.trust_remote_code)
        model.require(torch.device("cpu"), packing=recipe.packing != "none")
        if adapter is not None:
            adapt(model, adapter, keep_originals=keeps)
            fill_adapter_alone(model, adapter, directory, recipe.seed)
        freeze(model, recipe.training.freeze if trained else ["*"])
        return model

    def write(model: Model) -> None:
        fill(model, adapter, directory, recipe.seed)

    return spread(build, plan, world, write)


def assemble(run: RunDirectory, world: World) -> Assembled:
    """Build this worker's part of the run and take up the newest complete checkpoint."""
    recipe, plan = run.read_recipe(), run.read_plan()
    # A launcher's OMP_NUM_THREADS knows nothing of the plan, and the plan nothing of a machine with
    # fewer cores than the first worker's.
    torch.set_num_threads(min(plan.threads, usable_cores()))
    data = open_data(run.path)
    steps = total_steps(recipe, data.train)
    spread_model = build_model(run, recipe, plan, world)
    joined, held = Joined.read(run), None
    optimizers = build_all_optimizers(spread_model, recipe.optimizer, recipe.adapter)
    if joined is not None and joined.settings.method in GRADIENT_METHODS:
        held = HeldGradients(spread_model.trained_parameters(), recipe.optimizer.learning_rate)
        optimizers = [held]
    objective, reference = what_is_optimised(run, recipe, plan, world, spread_model, data)
    step = TrainStep(
        spread_model,
        optimizers,
        objective,
        recipe.training,
        seed=recipe.seed,
        reference=reference,
    )
    store = CheckpointStore(
        run.checkpoints,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        keep_best=recipe.checkpoint.keep_best,
    )
    store.claim()
    start, meta = store.latest() or 0, None
    if start:
        meta = load_training_state(
            store, start, spread_model.parts, optimizers, spread_model.pieces, seed=recipe.seed
        )
        step.loss_scale.restore(meta["loss_scale"])

    trainer = Trainer(
        recipe=recipe,
        data=data.train,
        rows=plan.rows_of(spread_model.mesh.index("data")),
        step=step,
        total_steps=steps,
        start=start,
    )
    writer, progress = _first_worker_only(run, recipe, plan, world, start, steps)
    swarm = None
    if joined is not None:
        # Only those who train with others need the packages of the extra `swarm`.
        from trainwright.training.swarm_peer import PeerTrainer

        swarm = PeerTrainer(run, joined, recipe, step, trainer, held, writer, progress)
        trainer.start = swarm.begin(store, start, meta)

    save_every = recipe.checkpoint.every or -(-steps // 10)

    def state(done: int) -> tuple[State, dict]:
        meta = {"step": done, "loss_scale": step.loss_scale.state(), "world_size": world.size}
        tensors = training_tensors(spread_model.parts, optimizers, spread_model.pieces)
        if swarm is not None:
            more, place = swarm.saved()
            tensors, meta = {**tensors, **more}, {**meta, **place}
        return tensors, meta

    evaluation = EvaluationHook(
        run,
        recipe,
        recipe.evaluation.every or 2 * save_every,  # so that every other checkpoint has a score
        steps,
        data.validation,
        spread_model,
        objective,
        reference,
        data.load_tokenizer,
        writer,
        progress,
    )
    checkpoints = CheckpointHook(
        store,
        save_every,
        state,
        lambda: evaluation.newest,
        recipe.checkpoint.asynchronous,
        writer,
    )
    hooks: list[Hook] = [evaluation, checkpoints]
    if swarm is not None:
        hooks.insert(0, swarm.hook)
    peaks = world.gather(peak_flops(world.device, plan.precision))
    if writer is not None and progress is not None:
        metrics = MetricsHook(
            writer,
            progress,
            log_every=recipe.tracking.log_every,
            tokens_per_step=plan.batch_tokens,
            mfu_tokens_per_second=_full_speed(run, plan, peaks),
            device=world.device,
        )
        hooks.insert(0, metrics)
    trainer.hooks = hooks
    return Assembled(trainer, store, writer, progress, time.time(), swarm)


def freeze(model: Model, patterns: Sequence[str]) -> None:
    """Leave parameters untrained whose names hold one of the patterns; `*` is anything."""
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns):
            parameter.requires_grad_(False)


def build_all_optimizers(
    spread_model: SpreadModel, section: OptimizerSection, adapter: Adapter | None = None
) -> list[torch.optim.Optimizer]:
    """Optimizers over all that this worker has of the model and trains."""
    return build_optimizers(
        spread_model.trained_parameters(),
        section,
        in_blocks=[
            p for part in spread_model.parts for block in part.blocks for p in block.parameters()
        ],
        muon_dtype=COMPUTE_DTYPES[spread_model.plan.precision],
        replicas=None if spread_model.sharded else spread_model.mesh.group("replicas"),
        whole=WholePieces(spread_model.named_parameters(), spread_model.pieces, spread_model.mesh),
        offload=spread_model.plan.offload == "optimizer",
        factors=rate_factors(spread_model, adapter, section.learning_rate),
    )


def _full_speed(run: RunDirectory, plan: Plan, peaks: Sequence[float | None]) -> float | None:
    """Tokens a second at an MFU of 1; None where the model's FLOPs or a peak are not known.

    `peaks` are the workers' FLOP/s, whose devices may differ.
    """
    hf_config = run.read_model_config()
    known = [peak for peak in peaks if peak is not None]
    if hf_config["model_type"] not in FAMILIES or len(known) < len(peaks):
        return None
    flops = 3 * flops_per_token(decoder_config(hf_config), plan.sequence_length)
    return sum(known) / flops


def _first_worker_only(
    run: RunDirectory, recipe: Recipe, plan: Plan, world: World, start: int, steps: int
) -> tuple[MetricsWriter | None, Progress | None]:
    if not world.is_first:
        return None, None
    progress = Progress()
    writer = MetricsWriter(
        run.path,
        recipe.tracking,
        recipe.name,
        recipe.model_dump(mode="json"),
        warn=progress.say,
    )
    writer.truncate_after(start)
    record = {
        "kind": "start",
        "step": start,
        "total_steps": steps,
        "name": recipe.name,
        "world_size": plan.world_size,
    }
    hf_config = run.read_model_config()
    if hf_config["model_type"] in FAMILIES:
        record["parameters"] = parameter_count(decoder_config(hf_config))
    writer.write(record)
    progress.start(steps, start)
    return writer, progress
