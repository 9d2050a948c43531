"""Plans against one process: the sameness check on small models, for tests of single features."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainwright.models.families import new_hf_config
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Recipe
from trainwright.training.sameness import ROWS, Outcome, compare, write_reference

SEQUENCE, STEPS = 16, 3
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """What is trained: a family, an optimizer, more of the recipe's `training` and of the model."""

    family: str = "llama"
    optimizer: str = "adamw"
    training: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, Any]:
        return SIZES | (EXPERTS if self.family == "mixtral" else {}) | self.keys

    def recipe(self) -> Recipe:
        training = {"steps": STEPS, "batch_sequences": ROWS, "precision": "fp32"}
        return Recipe.model_validate(
            {
                "model": {"family": self.family, "config": self.sizes},
                "training": {**training, "gradient_clip": None, **self.training},
                "optimizer": {"name": self.optimizer, "learning_rate": 1e-2},
            }
        )


def plan(micro_batch: int = 2, **degrees: Any) -> Plan:
    """A plan of these degrees; `zero` is 3 where sharding is wanted and nothing is said."""
    world = 1
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
        world *= degrees.get(axis, 1)
    rows = degrees.get("dp_replicate", 1) * degrees.get("dp_shard", 1)
    stages = degrees.get("pp", 1) * degrees.get("virtual_stages", 1)
    return replace(
        Plan.alone("cpu"),
        world_size=world,
        micro_batch=micro_batch,
        accumulation=ROWS // (rows * micro_batch),
        sequence_length=SEQUENCE,
        stage_layers=(SIZES["num_hidden_layers"] // stages,) * stages if stages > 1 else (),
        **{"zero": 3 if degrees.get("dp_shard", 1) > 1 else 0, **degrees},
    )


def reference(folder: Path, case: Case) -> str:
    """Train in one process, into `folder`; its name."""
    config = new_hf_config(case.family, case.sizes, 64)
    write_reference(folder, case.recipe(), config, SEQUENCE, STEPS)
    return str(folder)


def outcome(folder: str, case: Case, spread: Plan) -> Outcome:
    """Train spread over this process group's ranks; how far it is from the reference."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    config = new_hf_config(case.family, case.sizes, 64)
    return compare(Path(folder), case.recipe(), config, spread, world)
