"""Everything that happens once, before workers start: run directory, data, model config, plan."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from trainwright.data.batches import Batches
from trainwright.data.prepare import PreparedData, prepare_data
from trainwright.files import write_atomically, write_json
from trainwright.models.directory import resolve_model_directory
from trainwright.models.families import FAMILIES, DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.explain import explain_plan
from trainwright.planner.make import make_plan
from trainwright.planner.plan import Plan
from trainwright.recipe.load import dump_recipe
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import ModelSection, Recipe
from trainwright.training.machine import detect_machine, environment_facts
from trainwright.training.run_directory import RunDirectory

GENERATION = "generation_config.json"


def total_steps(recipe: Recipe, train: Batches) -> int:
    """Optimizer steps of the whole run, from `steps`, `tokens` or `epochs`."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (recipe.batch_sequences * recipe.data.sequence_length))
    assert training.epochs is not None
    return math.ceil(training.epochs * train.rows_per_epoch / recipe.batch_sequences)


def prepare_run(
    run: RunDirectory, recipe: Recipe, recipe_text: str | None, say: Callable[[str], None]
) -> tuple[Plan, PreparedData]:
    """Put into the run directory all that its workers read.

    `recipe_text` is the YAML as the user wrote it; `say` is told what takes long. Raises UserError
    for what cannot be trained.
    """
    run.logs.mkdir(exist_ok=True)
    if not run.has_trained:
        # Nothing was learnt here yet: a corrected recipe takes the place of the one before.
        for file in (run.recipe, run.data):
            file.unlink(missing_ok=True)
    if recipe_text is not None and not run.recipe.exists():
        write_atomically(run.recipe, recipe_text)
    write_atomically(run.resolved, dump_recipe(recipe))
    directory = pretrained_directory(recipe.model)
    data = prepare_data(
        recipe, str(directory) if directory else None, directory=run.path, progress=say
    )
    hf_config = choose_model_config(recipe, directory, data.vocabulary)
    config = decoder_config(hf_config) if hf_config["model_type"] in FAMILIES else None
    steps = total_steps(recipe, data.train)
    plan = make_plan(recipe, detect_machine(), config, steps, native=config is not None)
    for line in _overview(run, recipe, plan, config, data, steps):
        say(line)
    write_json(run.model_config, hf_config)
    if directory is not None and (directory / GENERATION).is_file():
        shutil.copyfile(directory / GENERATION, run.model_config.with_name(GENERATION))
    write_atomically(run.plan, plan.to_json())
    write_json(run.environment, environment_facts())
    return plan, data


def _overview(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    config: DecoderConfig | None,
    data: PreparedData,
    steps: int,
) -> Iterator[str]:
    """What is about to be trained, for the screen."""
    origin = recipe.model.path or f"new {recipe.model.family}"
    epochs = steps * plan.batch_sequences / data.train.rows_per_epoch
    held_out = sum(batches.documents for batches in data.validation.values())
    rows = [
        ("run", str(run.path)),
        ("model", origin),
        ("data", f"{data.train.documents:,} documents, {data.train.tokens:,} tokens"),
        ("held out", f"{held_out:,} documents"),
        ("vocabulary", f"{data.vocabulary:,}"),
        ("steps", f"{steps:,} ({epochs:.2g} epochs)"),
        *explain_plan(plan, config),
    ]
    return (f"  {name:<15}{value}" for name, value in rows)


def pretrained_directory(section: ModelSection) -> Path | None:
    """Where the pretrained model of a recipe's `model:` is; None for a new model."""
    if section.path is None:
        return None
    return resolve_model_directory(section.path, trust_remote_code=section.trust_remote_code)


def choose_model_config(recipe: Recipe, directory: Path | None, vocabulary: int) -> dict:
    """The Hugging Face config of the model to train, for a tokenizer of `vocabulary` entries."""
    if directory is not None:
        return json.loads((directory / "config.json").read_text())
    assert recipe.model.family is not None
    shape = model_config(recipe.model)
    # A vocabulary given in the recipe may have room to spare; left out, it fits exactly.
    return new_hf_config(recipe.model.family, shape, shape.get("vocab_size", vocabulary))
