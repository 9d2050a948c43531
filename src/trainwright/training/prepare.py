"""Everything that happens once, before workers start: run directory, data, model config, plan."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from trainwright.data.batches import Batches
from trainwright.data.prepare import PreparedData, prepare_data
from trainwright.errors import UserError
from trainwright.files import write_atomically, write_json
from trainwright.models.directory import has_new_head, resolve_model_directory
from trainwright.models.families import FAMILIES, DecoderConfig, decoder_config, new_hf_config
from trainwright.models.scoring import with_head
from trainwright.planner.beside import Beside, tokens_mistake, vocabulary_mistake
from trainwright.planner.budget import Budget, memory_budget
from trainwright.planner.explain import advice_lines, explain_plan
from trainwright.planner.make import make_plan, memory_advice
from trainwright.planner.plan import Plan
from trainwright.recipe.load import dump_recipe
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import ModelSection, Recipe
from trainwright.training.machine import detect_machine, environment_facts
from trainwright.training.run_directory import RunDirectory
from trainwright.training.tasks import check_tasks

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
    hf_config = choose_model_config(recipe, directory, data.vocabulary, data.pad_id)
    config = decoder_config(hf_config) if hf_config["model_type"] in FAMILIES else None
    most = None if config is None else config.max_positions
    check_tasks(recipe.evaluation.tasks, data.tokenizer_directory, most)
    steps = total_steps(recipe, data.train)
    beside = _model_beside(recipe, hf_config, data.tokenizer_directory)
    machine = detect_machine()
    plan = make_plan(recipe, machine, config, steps, native=config is not None, beside=beside)
    budget = memory_budget(recipe, plan, config, machine, beside) if config is not None else None
    for line in _overview(run, recipe, plan, config, data, steps, directory, budget):
        say(line)
    if config is not None and budget is not None and not budget.fits():
        say("  That may be more memory than there is.")
        for line in advice_lines(memory_advice(recipe, plan, machine, config, beside)):
            say(f"  {line}")
    write_json(run.model_config, hf_config)
    if directory is not None and (directory / GENERATION).is_file():
        shutil.copyfile(directory / GENERATION, run.model_config.with_name(GENERATION))
    write_atomically(run.plan, plan.to_json())
    write_json(run.environment, environment_facts())
    return plan, data


def _model_beside(recipe: Recipe, hf_config: dict, tokenizer: Path) -> Beside | None:
    """The named reference or teacher, downloaded where it is on the hub; None where none is."""
    objective = recipe.objective
    named = objective.teacher or objective.reference
    if named is None:
        return None
    directory = pretrained_directory(ModelSection(path=named))
    assert directory is not None
    other = json.loads((directory / "config.json").read_text())
    key = "objective.teacher" if objective.teacher else "objective.reference"
    mistake = tokens_mistake(key, tokenizer, directory)
    if objective.teacher is not None:
        mistake = vocabulary_mistake(hf_config["vocab_size"], other["vocab_size"]) or mistake
    if mistake is not None:
        raise UserError(mistake)
    native = other["model_type"] in FAMILIES
    config = decoder_config(other) if native else None
    return Beside(key, config, native, stays=not objective.cache_reference)


def _overview(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    config: DecoderConfig | None,
    data: PreparedData,
    steps: int,
    directory: Path | None,
    budget: Budget | None,
) -> Iterator[str]:
    """What is about to be trained, for the screen."""
    origin = recipe.model.path or f"new {recipe.model.family}"
    if config is not None and directory is not None and has_new_head(config, directory):
        origin += ", with a new score head"
    epochs = steps * plan.batch_sequences / data.train.rows_per_epoch
    held_out = sum(batches.documents for batches in data.validation.values())
    rows = [
        ("run", str(run.path)),
        ("model", origin),
        ("data", f"{data.train.documents:,} documents, {data.train.tokens:,} tokens"),
        ("held out", f"{held_out:,} documents"),
        ("vocabulary", f"{data.vocabulary:,}"),
        ("steps", f"{steps:,} ({epochs:.2g} epochs)"),
        *explain_plan(plan, config, budget),
    ]
    return (f"  {name:<15}{value}" for name, value in rows)


def pretrained_directory(section: ModelSection) -> Path | None:
    """Where the pretrained model of a recipe's `model:` is; None for a new model."""
    if section.path is None:
        return None
    return resolve_model_directory(section.path, trust_remote_code=section.trust_remote_code)


def choose_model_config(
    recipe: Recipe, directory: Path | None, vocabulary: int, pad_id: int | None = None
) -> dict:
    """The Hugging Face config of the model to train, for a tokenizer of `vocabulary` entries.

    `pad_id` is the token that rows are padded with. Raises UserError where the model is none for
    the objective.
    """
    hf_config = _model_config(recipe, directory, vocabulary)
    return with_head(hf_config, scores=recipe.objective.gives_scores, pad_token_id=pad_id)


def _model_config(recipe: Recipe, directory: Path | None, vocabulary: int) -> dict:
    if directory is not None:
        return json.loads((directory / "config.json").read_text())
    assert recipe.model.family is not None
    shape = model_config(recipe.model)
    # A vocabulary given in the recipe may have room to spare; left out, it fits exactly.
    return new_hf_config(recipe.model.family, shape, shape.get("vocab_size", vocabulary))
