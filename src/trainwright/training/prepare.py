"""Everything that happens once, before workers start: run directory, data, model config, plan."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.data.batches import Batches
from trainwright.data.prepare import PreparedData, prepare_data
from trainwright.errors import UserError
from trainwright.files import write_atomically, write_json
from trainwright.models.directory import has_new_head, resolve_model_directory
from trainwright.models.families import FAMILIES, DecoderConfig, decoder_config, new_hf_config
from trainwright.models.scoring import with_head
from trainwright.planner.beside import Beside, tokens_mistake, vocabulary_mistake
from trainwright.planner.budget import Budget, memory_budget
from trainwright.planner.explain import advice_lines, explain_plan, foretold
from trainwright.planner.make import memory_advice
from trainwright.planner.plan import Machine
from trainwright.planner.plan_record import lasting_facts
from trainwright.recipe.load import different_keys, dump_recipe
from trainwright.recipe.presets import model_config
from trainwright.recipe.schema import ModelSection, Recipe
from trainwright.training.machine import detect_machine, environment_facts
from trainwright.training.run_directory import RunDirectory
from trainwright.training.tasks import check_tasks

if TYPE_CHECKING:
    from trainwright.planner.choose import Choice

GENERATION = "generation_config.json"
# What a run may change when it goes on, and what its plan depends on.
DECIDE_THE_PLAN = (
    "parallel",
    "cluster",
    "training.recompute",
    "training.activation_offload",
    "training.compile",
)


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
    run: RunDirectory,
    recipe: Recipe,
    recipe_text: str | None,
    say: Callable[[str], None],
    *,
    plans: int = 0,
) -> Choice:
    """Put into the run directory all that its workers read; the plan, with those ranked below it.

    `recipe_text` is the YAML as the user wrote it; `say` is told what takes long. `plans` are
    wanted to be tried. Raises UserError for what cannot be trained.
    """
    # The search loads scipy, and every worker imports this module.
    from trainwright.planner.choose import choose_plan

    run.logs.mkdir(exist_ok=True)
    machine = detect_machine()
    kept = None if plans else kept_choice(run, recipe, machine)
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
    native = config is not None
    visible = data.train.packing_figures().visible
    choice = kept or choose_plan(
        recipe, machine, config, steps, native, beside, top=plans, visible_share=visible
    )
    plan = choice.plan
    budget = memory_budget(recipe, plan, config, machine, beside) if config is not None else None
    for line in _overview(run, recipe, choice, config, data, steps, directory, budget):
        say(line)
    if config is not None and budget is not None and not budget.fits():
        say("  That may be more memory than there is.")
        for line in advice_lines(memory_advice(recipe, plan, machine, config, beside)):
            say(f"  {line}")
    write_json(run.model_config, hf_config)
    if directory is not None and (directory / GENERATION).is_file():
        shutil.copyfile(directory / GENERATION, run.model_config.with_name(GENERATION))
    if kept is None:
        run.write_plan(choice.record(machine))
    write_json(run.environment, environment_facts())
    return choice


def kept_choice(run: RunDirectory, recipe: Recipe, machine: Machine) -> Choice | None:
    """The plan that a run began with, where it goes on as it was; None where it is planned anew.

    That is on another machine or number of workers, or where keys have changed that a plan depends
    on. Raises UserError where plan.json is not the run's own.
    """
    from trainwright.planner.choose import Choice

    if not run.has_trained or (record := run.read_plan_record()) is None:
        return None
    if record.machine != lasting_facts(machine):
        return None
    if any(key.startswith(DECIDE_THE_PLAN) for key in different_keys(run.read_recipe(), recipe)):
        return None
    return Choice(record.plan, record.origin, record.reason, prediction=record.prediction)


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
    choice: Choice,
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
    plan = choice.plan
    epochs = steps * plan.batch_sequences / data.train.rows_per_epoch
    held_out = sum(batches.documents for batches in data.validation.values())
    rows = [
        ("run", str(run.path)),
        ("model", origin),
        ("data", f"{data.train.documents:,} documents, {data.train.tokens:,} tokens"),
        ("held out", f"{held_out:,} documents"),
        ("vocabulary", f"{data.vocabulary:,}"),
        ("steps", f"{steps:,} ({epochs:.2g} epochs)"),
        ("plan", choice.reason),
        *explain_plan(plan, config, budget),
        *foretold(choice.prediction),
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
