"""The check of sameness can fail: faults that real systems have had are each caught."""

from __future__ import annotations

import pytest

from tests.sameness.checks import check, config_of, plan_of, recipe_of
from tests.sameness.faults import FAULTS
from tests.workers import run_on
from trainwright.training import sameness
from trainwright.training.sameness import Outcome
from trainwright.training.shrink import SEQUENCE

pytestmark = pytest.mark.slow

STEPS = 2  # a fault shows in the first step's gradients, or after the first update
TIED = ("llama", {"tie_word_embeddings": True}, {})
MIXTURE = ("mixtral", {"num_local_experts": 8}, {"router_balance_loss": 0.01})
PLAIN = ("llama", {}, {})
DROPOUT = ("llama", {}, {"dropout": 0.2})
# Tied embeddings, of which a reward model has no copy.
REWARD = ("llama", {"tie_word_embeddings": True, "scores": True}, {"objective": "reward"})

# Each fault with a model and a plan on two workers where it can do harm.
CASES = {
    "a_gradient_reduction_is_left_out": (PLAIN, {"dp_replicate": 2}),
    "replicas_gradients_are_averaged": (PLAIN, {"dp_replicate": 2}),
    "shards_gradients_are_averaged": (PLAIN, {"dp_shard": 2, "zero": 2}),
    "a_tied_gradient_is_not_shared": (TIED, {"pp": 2, "stage_layers": (4, 4)}),
    "rotary_positions_are_off_under_cp": (PLAIN, {"cp": 2}),
    "own_queries_turn_by_the_first_workers_positions": (
        PLAIN,
        {"tp": 2, "whole": ("attention",), "accumulation": 16},
    ),
    "gathered_keys_keep_the_own_queries_gradients_only": (
        PLAIN,
        {"tp": 2, "whole": ("attention",), "accumulation": 16},
    ),
    "a_document_border_leaks": (PLAIN, {"cp": 2, "cp_method": "all_gather"}),
    "the_loss_is_divided_by_each_ranks_own_weight": (PLAIN, {"dp_shard": 2, "zero": 3}),
    "replicas_begin_where_equal_parts_would": (
        PLAIN,
        {"dp_replicate": 2, "rows_by_replica": (12, 4)},
    ),
    "each_stage_clips_by_its_own_norm": (PLAIN, {"pp": 2, "stage_layers": (4, 4)}),
    "an_experts_gradient_is_scaled_by_ep": (MIXTURE, {"dp_shard": 2, "ep": 2, "zero": 3}),
    "a_stages_layer_is_applied_twice": (PLAIN, {"pp": 2, "stage_layers": (7, 1)}),
    "a_micro_batch_is_dropped": (PLAIN, {"pp": 2, "stage_layers": (4, 4)}),
    "dropout_differs_across_tp": (DROPOUT, {"tp": 2}),
    "a_norms_gradient_is_not_summed_over_tp": (PLAIN, {"tp": 2}),
    "a_branch_is_not_summed_on_leaving": (PLAIN, {"tp": 2}),
    "a_target_is_looked_up_in_the_wrong_part_of_the_vocabulary": (PLAIN, {"tp": 2}),
    "the_balance_loss_counts_once_a_tp_rank": (MIXTURE, {"tp": 2}),
    "a_score_counts_once_a_tp_rank": (REWARD, {"tp": 2}),
    "a_worker_s_last_tokens_pass_for_the_sequences": (REWARD, {"cp": 2}),
}
# Where the fault sits, the parameter whose gradient is furthest off tells it.
NAMED = {
    "a_tied_gradient_is_not_shared": "embed_tokens",
    "an_experts_gradient_is_scaled_by_ep": ".experts.",
    "a_norms_gradient_is_not_summed_over_tp": "norm",
    "the_balance_loss_counts_once_a_tp_rank": "mlp.gate.weight",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder with one process's losses and gradients for a model, made once."""
    made: dict[str, str] = {}

    def folder_of(family: str, keys: dict, training: dict) -> str:
        name = repr((family, keys, training))
        if name not in made:
            folder = tmp_path_factory.mktemp("reference")
            recipe, config = recipe_of(family, **training), config_of(family, **keys)
            sameness.write_reference(folder, recipe, config, SEQUENCE, STEPS)
            made[name] = str(folder)
        return made[name]

    return folder_of


def outcome(reference, model: tuple, fields: dict, fault: str | None) -> Outcome:
    family, keys, training = model
    recipe, config = recipe_of(family, **training), config_of(family, **keys)
    plan = plan_of(2, **fields)
    return run_on(2, check, reference(*model), recipe, config, plan, fault)[0]


def test_every_fault_has_a_case():
    assert set(CASES) == set(FAULTS)
    assert len(FAULTS) >= 12


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_is_caught(fault, reference):
    model, fields = CASES[fault]
    found = outcome(reference, model, fields, fault)
    assert not found.passed, f"{fault} went unseen: {found}"
    assert max(found.gradient, found.norm) > 10 * sameness.LOSS_LIMIT
    assert NAMED.get(fault, "") in found.name


@pytest.mark.parametrize("case", [PLAIN, TIED, MIXTURE, DROPOUT, REWARD], ids=lambda case: case[0])
def test_without_a_fault_the_same_plans_pass(case, reference):
    plans = {repr(fields): fields for model, fields in CASES.values() if model is case}
    for fields in plans.values():
        found = outcome(reference, case, fields, None)
        assert found.passed, found
