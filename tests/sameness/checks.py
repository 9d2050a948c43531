"""Plans checked against one process, with or without a fault planted in the workers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainwright.models.families import new_hf_config
from trainwright.models.scoring import with_head
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Recipe
from trainwright.training import sameness
from trainwright.training.sameness import ROWS, Outcome
from trainwright.training.shrink import SEQUENCE, shrunk
from trainwright.training.verify import settings_of

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}


def config_of(family: str, scores: bool = False, **keys: Any) -> dict[str, Any]:
    """The small model of a family that `verify` would make; one that `scores` for `reward`."""
    shape = {**SHAPE, **(LATENT if family == "deepseek_v3" else {}), **keys}
    return shrunk(with_head(new_hf_config(family, shape, 128), scores=scores))


def recipe_of(family: str = "llama", objective: Any = "next_token", **training: Any) -> Recipe:
    """A recipe's settings as `verify` takes them."""
    recipe = Recipe.model_validate(
        {
            "name": "sameness",
            "model": {"family": family, "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"]},
            "training": {"steps": 5, **training},
            "objective": objective,
        }
    )
    return settings_of(recipe)


def plan_of(world: int, **fields: Any) -> Plan:
    """A plan for the batch that `sameness` makes; two micro-batches a step, or two a stage."""
    plan = replace(
        Plan.alone("cpu"), world_size=world, sequence_length=SEQUENCE, optimizer="adamw", **fields
    )
    by_replica = plan.rows_by_replica or (ROWS // plan.dp_replicate,)
    own = [rows // plan.dp_shard for rows in by_replica]
    unit = math.gcd(*own)
    micro_batch = unit // fields.get("accumulation", min(unit, 2 * plan.pp))
    return replace(plan, micro_batch=micro_batch, accumulation=max(own) // micro_batch)


def check(
    folder: str, recipe: Recipe, hf_config: dict[str, Any], plan: Plan, fault: str | None = None
) -> Outcome:
    """On a worker: the plan's outcome, with the named fault of `tests.sameness.faults` in place."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with planted(fault, plan):
        return sameness.compare(Path(folder), recipe, hf_config, plan, world)


def planted(fault: str | None, plan: Plan) -> contextlib.AbstractContextManager[None]:
    """The fault in place, or nothing."""
    if fault is None:
        return contextlib.nullcontext()
    from tests.sameness.faults import FAULTS

    return FAULTS[fault](plan)


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` as something else for a while."""
    before = owner.__dict__[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)
