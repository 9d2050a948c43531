"""Replicas that take unequal parts of a batch learn what one process does."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.sameness.checks import check, config_of, plan_of, recipe_of
from tests.workers import run_on
from trainwright.planner.combinations import enumerate_plans
from trainwright.planner.plan import Plan
from trainwright.training import sameness, verify
from trainwright.training.sameness import ROWS, Outcome
from trainwright.training.shrink import SEQUENCE

STEPS = 2
PLAIN: tuple[str, dict, dict] = ("llama", {}, {"dropout": 0.1})
MIXTURE = ("mixtral", {"num_local_experts": 8}, {"router_balance_loss": 0.01})
KTO = ("llama", {}, {"objective": {"kind": "kto"}})

IN_V = {"schedule": "zbv", "virtual_stages": 2, "stage_layers": (2, 2, 2, 2)}
# A model, rows of the replicas, and what else the plan has; micro-batches of one row or two.
CASES: dict[str, tuple[tuple[str, dict, dict], tuple[int, ...], dict[str, Any]]] = {
    "two replicas": (PLAIN, (12, 4), {}),
    "four replicas": (PLAIN, (1, 1, 11, 3), {}),
    "shards, zero 1": (PLAIN, (4, 12), {"dp_shard": 2, "zero": 1}),
    "shards, zero 3": (PLAIN, (12, 4), {"dp_shard": 2, "zero": 3}),
    "pipelines": (PLAIN, (10, 6), {"pp": 2, "stage_layers": (5, 3)}),
    "pipelines that split": (PLAIN, (11, 5), {"pp": 2, **IN_V}),
    "context": (PLAIN, (2, 14), {"cp": 2}),
    "tensors": (PLAIN, (9, 7), {"tp": 2}),
    "experts": (MIXTURE, (12, 4), {"dp_shard": 2, "ep": 2, "zero": 2}),
    # Two pools of two workers each: replicas in a pool each, or the second pool's stage first.
    "pipelines within pools": (
        PLAIN,
        (12, 4),
        {"pp": 2, "stage_layers": (5, 3), "ranks": (0, 2, 1, 3)},
    ),
    "a pool after another": (
        PLAIN,
        (16,),
        {"pp": 2, "stage_layers": (5, 3), "dp_shard": 2, "zero": 2, "ranks": (2, 3, 0, 1)},
    ),
    "shards within pools": (
        PLAIN,
        (4, 12),
        {"dp_shard": 2, "zero": 3, "ranks": (2, 3, 0, 1)},
    ),
    "a reference, and one baseline for all": (KTO, (12, 4), {"pp": 2, "stage_layers": (4, 4)}),
}


def uneven(rows: tuple[int, ...], **fields: Any) -> Plan:
    world = math.prod(fields.get(axis, 1) for axis in ("dp_shard", "pp", "cp", "tp")) * len(rows)
    return plan_of(world, dp_replicate=len(rows), rows_by_replica=rows, **fields)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    made: dict[str, str] = {}

    def folder_of(model: tuple[str, dict, dict]) -> str:
        if repr(model) not in made:
            folder = tmp_path_factory.mktemp("reference")
            family, keys, settings = model
            sameness.write_reference(
                folder, recipe_of(family, **settings), config_of(family, **keys), SEQUENCE, STEPS
            )
            made[repr(model)] = str(folder)
        return made[repr(model)]

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_unequal_parts_train_as_one_process_does(name, references):
    model, rows, fields = CASES[name]
    plan = uneven(rows, **fields)
    assert plan.batch_sequences == ROWS
    recipe, config = recipe_of(model[0], **model[2]), config_of(model[0], **model[1])
    found: Outcome = run_on(plan.world_size, check, references(model), recipe, config, plan)[0]
    assert found.passed, f"{verify.in_words(plan)}: {found}"


def test_verify_has_plans_with_unequal_parts():
    config = sameness.decoder_config(config_of("llama"))
    plans = enumerate_plans(config, 8, sequence_length=SEQUENCE, batch_sequences=ROWS)
    found = [plan for plan in plans if plan.rows_by_replica]
    assert all(plan.batch_sequences == ROWS for plan in found)
    beside = {axis for plan in found for axis in verify.features(plan)}
    assert beside >= {"pp", "dp_shard", "cp", "tp", "zero 1", "zero 3", "dualpipev", "uneven rows"}
    chosen = verify.choose(plans, 100, 0)
    assert sum(bool(plan.rows_by_replica) for plan in chosen) >= 5
    assert "rows 6+2" in verify.in_words(uneven((6, 2)))
