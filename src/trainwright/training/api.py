"""The verbs as functions: train, load_model, generate, export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError
from trainwright.parallel.world import join_world, leave_world
from trainwright.planner.check import recipe_checks
from trainwright.recipe.load import dump_recipe, load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.report.html import write_report
from trainwright.resilience.guard import watched
from trainwright.resilience.reports import OutOfMemory, WorkerFailed, clear_reports
from trainwright.rollout.engine import Completion
from trainwright.rollout.engine import generate as generate_completions
from trainwright.rollout.sampling import SamplingParams
from trainwright.training.artifacts import complete_step, load_model, open_model, result_figures
from trainwright.training.exporting import check_further, export_further
from trainwright.training.exporting import export_run as export
from trainwright.training.launch import RunInterrupted, is_launched, launch_workers
from trainwright.training.memory_report import explained
from trainwright.training.prepare import prepare_run
from trainwright.training.run_directory import RunDirectory, default_run_directory, locked, open_run
from trainwright.training.worker import run_worker

__all__ = ["RunResult", "export", "generate", "load_model", "train"]

PREPARATION = timedelta(days=7)  # that the other workers wait while the first reads the sources


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: its folder, the export and the report, and its figures."""

    directory: Path
    export: Path | None
    report: Path
    figures: dict[str, float | int | str]


def train(
    recipe: Recipe | str | Path,
    *overrides: str,
    say: Callable[[str], None] = lambda message: None,
    from_step: int | None = None,
    verbose: bool = False,
    tune: int = 0,
) -> RunResult | None:
    """Train a recipe to its end, or continue its run: the export and the report included.

    `recipe` is a Recipe or a YAML file, `overrides` are "key.path=value". A run goes on from its
    newest checkpoint, or from `from_step`: newer ones are then set aside. `verbose` shows each
    dimension's traffic while it trains. `tune` tries so many plans for a few steps each, and
    follows the quickest. Starts the workers itself; in a process that torchrun or the like
    started, joins the others instead (and returns None on every rank but the first). Raises
    UserError, RunInterrupted or WorkerFailed.
    """
    if isinstance(recipe, Recipe):
        # Read like a file in the current folder: overrides, paths and checks are then the same.
        path, recipe_text = Path.cwd() / "recipe.yaml", dump_recipe(recipe)
        recipe = load_recipe(path, overrides, recipe_checks, text=recipe_text)
    else:
        path = Path(recipe)
        recipe = load_recipe(path, overrides, recipe_checks)
        recipe_text = path.read_text()
    if is_launched():
        if tune:
            what = "--tune starts and ends workers itself, and a launcher has started these"
            raise UserError(what, fix="tune with `trainwright train` on one of the machines")
        return _train_launched(recipe, recipe_text, say, from_step, verbose)
    run = open_run(recipe)
    with locked(run):
        _rewind(run, from_step)
        choice = prepare_run(run, recipe, recipe_text, say, plans=tune)
        check_further(run)
        plan = choice.plan
        if tune:
            from trainwright.training.tune import tune as try_plans

            plan = try_plans(run, choice, tune, say)
        launch_workers(run.path, plan, verbose=verbose)
        return finish_run(run)


def _rewind(run: RunDirectory, from_step: int | None) -> None:
    if from_step is not None:
        with CheckpointStore(run.checkpoints) as store:
            store.rewind(complete_step(run, from_step))


def _train_launched(
    recipe: Recipe,
    recipe_text: str | None,
    say: Callable[[str], None],
    from_step: int | None,
    verbose: bool,
) -> RunResult | None:
    """Train as one of the workers that a launcher started; the first prepares and finishes."""
    run = RunDirectory(default_run_directory(recipe))
    with ExitStack() as held:
        try:
            with watched(run.logs):
                world = join_world()
                if world.is_first:
                    run = open_run(recipe)
                    held.enter_context(locked(run))
                    clear_reports(run.logs)
                _rewind(run, from_step)  # all together
                if world.is_first:
                    prepare_run(run, recipe, recipe_text, say)
                    check_further(run)
                world.wait(PREPARATION)
                finished = run_worker(run, world, verbose=verbose)
                leave_world(world)
        except UserError:
            raise
        except OutOfMemory as error:
            raise explained(run, error) from error
        except Exception as error:  # told by `watched`, with its rank and traceback
            raise WorkerFailed(f"{type(error).__name__}: {error}") from error
        if not finished:
            raise RunInterrupted(saved=True)
        return finish_run(run) if world.is_first else None


def finish_run(run: RunDirectory) -> RunResult:
    """Export the last step as the recipe says, and upload it; write the report."""
    # The cost model loads scipy, which the other workers of a launcher do without.
    from trainwright.training.tune import learn_from

    recipe = run.read_recipe()
    learn_from(run)
    exported = export(run) if recipe.export.at_end else None
    result = RunResult(
        run.path, exported, write_report(run.path), result_figures(run, complete_step(run))
    )
    if recipe.export.at_end:
        export_further(run, exported)
    return result


def generate(
    reference: str | Path,
    prompts: str | Sequence[str],
    *,
    device: str | None = None,
    **sampling: Any,
) -> list[Completion]:
    """Complete `prompts` with the model at `reference`; `sampling` are SamplingParams' fields."""
    opened = open_model(reference, device=device)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return generate_completions(opened.model, opened.tokenizer, prompts, SamplingParams(**sampling))
