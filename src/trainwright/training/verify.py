"""`trainwright verify`: many plans of a recipe's model family, each against one process."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.errors import Mistake, UserError
from trainwright.models.families import FAMILIES, decoder_config
from trainwright.parallel.world import World
from trainwright.planner.combinations import dimensions, enumerate_plans
from trainwright.planner.plan import Plan
from trainwright.planner.plan_words import in_words as in_words
from trainwright.recipe.schema import Recipe
from trainwright.training import sameness
from trainwright.training.pool import WorkerPool, WorkersLostError
from trainwright.training.prepare import choose_model_config, pretrained_directory
from trainwright.training.sameness import ROWS, Outcome
from trainwright.training.shrink import SEQUENCE, VOCABULARY, shrunk

PLAN_SECONDS = 180.0  # a plan that has not answered by then hangs; even on a busy machine


@dataclass(frozen=True)
class Question:
    """What is verified: the small model and the settings, the same for every plan."""

    recipe: Recipe
    hf_config: Mapping[str, Any]
    folder: Path


def verify(
    recipe: Recipe,
    *,
    world_size: int,
    plans: int | None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
    """Each chosen plan's outcome, as it comes. `plans` None: all there are.

    Raises UserError for a model that is none of the families, and where no plan is legal.
    """
    hf_config = small_config(recipe)
    settings = settings_of(recipe)
    legal = legal_plans(settings, hf_config, world_size)
    chosen = legal if plans is None else choose(legal, plans, seed)
    say(
        f"{hf_config['model_type']}: {len(chosen)} of {len(legal):,} legal plans for {world_size} "
        f"workers, {sameness.STEPS} steps each against one process, in fp32"
    )
    with (
        tempfile.TemporaryDirectory(prefix="trainwright-verify-") as folder,
        WorkerPool(world_size) as pool,
    ):
        question = Question(settings, hf_config, Path(folder))
        sameness.write_reference(question.folder, settings, hf_config, SEQUENCE)
        for plan in chosen:
            yield ask(pool, question, plan)


def ask(pool: WorkerPool, question: Question, plan: Plan) -> Outcome:
    """Run one plan on the pool's workers; a plan that fails or hangs is an outcome as well."""
    try:
        return pool.run(answer, question, plan, timeout=PLAN_SECONDS)[0]
    except WorkersLostError as lost:
        return Outcome(plan, float("inf"), float("inf"), "", float("inf"), error=str(lost))


def answer(question: Question, plan: Plan) -> Outcome:
    """On a worker: this plan's outcome."""
    import torch.distributed as dist

    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return sameness.compare(question.folder, question.recipe, question.hf_config, plan, world)


def small_config(recipe: Recipe) -> dict[str, Any]:
    """The config of the recipe's model, shrunk. Raises UserError for a model of no family."""
    directory = pretrained_directory(recipe.model)
    hf_config = choose_model_config(recipe, directory, VOCABULARY)
    if hf_config["model_type"] not in FAMILIES:
        raise UserError(
            Mistake(
                f"there is no family {hf_config['model_type']}: its model runs in transformers' "
                "own class, whose plans are data parallel only",
                f"verify a recipe with one of {', '.join(FAMILIES)}",
                key="model",
            )
        )
    return shrunk(hf_config)


def settings_of(recipe: Recipe) -> Recipe:
    """The recipe as it is verified: fp32, plain AdamW, nothing compiled.

    AdamW's first update is nearly the gradient's sign, which the last bit decides where a gradient
    is next to nothing: `eps` keeps such elements still. Muon would answer such bits with more.
    """
    training = recipe.training.model_copy(
        update={"precision": "fp32", "compile": False, "recompute": "none"}
    )
    optimizer = type(recipe.optimizer)(
        learning_rate=3e-4, eps=1e-6, weight_decay=recipe.optimizer.weight_decay
    )
    changed = {"training": training, "optimizer": optimizer}
    if recipe.adapter is not None:  # one that there is already does not fit the small model
        changed["adapter"] = recipe.adapter.model_copy(update={"path": None})
    return recipe.model_copy(update=changed)


def legal_plans(recipe: Recipe, hf_config: Mapping[str, Any], world_size: int) -> list[Plan]:
    """Every legal plan of the small model, in a fixed order. Raises UserError where none is."""
    found = enumerate_plans(
        decoder_config(hf_config),
        world_size,
        batch_sequences=ROWS,
        sequence_length=SEQUENCE,
        adapter=recipe.adapter,
        objective=recipe.objective,
    )
    if not found:
        raise UserError(
            f"no plan for {world_size} workers is legal", fix="choose another --world-size"
        )
    return found


def features(plan: Plan) -> set[str]:
    """What a plan has that others have not: its axes, schedule, methods, and pairs of them."""
    single = set(dimensions(plan))
    if plan.pp > 1:
        single |= {plan.schedule}
        if len(set(plan.stage_layers)) > 1:
            single |= {"uneven"}
    if plan.rows_by_replica:
        single |= {"uneven rows"}
    if plan.dp_shard > 1:
        single |= {f"zero {plan.zero}"}
    if plan.cp > 1:
        single |= {plan.cp_method}
    single |= {f"whole {part}" for part in plan.whole}
    if plan.recompute != "none":
        single |= {f"recompute {plan.recompute}"}
    if plan.recompute_by_layer:
        single |= {"recompute by layer"}
    pairs = {f"{a} + {b}" for a, b in itertools.combinations(sorted(single), 2)}
    return single | pairs


def choose(plans: Sequence[Plan], count: int, seed: int) -> list[Plan]:
    """`count` of the plans: first those that together have the most features, then any.

    The same seed chooses the same plans.
    """
    rest = list(plans)
    random.Random(seed).shuffle(rest)
    having = {id(plan): features(plan) for plan in rest}
    missing = set().union(*having.values()) if having else set()
    chosen: list[Plan] = []
    while rest and missing and len(chosen) < count:
        best = max(rest, key=lambda plan: len(having[id(plan)] & missing))
        chosen.append(best)
        rest.remove(best)
        missing -= having[id(best)]
    chosen += rest[: count - len(chosen)]
    order = {id(plan): number for number, plan in enumerate(plans)}
    return sorted(chosen, key=lambda plan: order[id(plan)])


def as_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON."""
    return {
        "plan": json.loads(outcome.plan.to_json()),
        "loss": outcome.loss,
        "gradient": outcome.gradient,
        "parameter": outcome.name,
        "norm": outcome.norm,
        "passed": outcome.passed,
        "error": outcome.error,
    }
