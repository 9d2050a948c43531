"""The formulas of memory and traffic against a real step: what tensors hold, what the meter counts.

Within 5 %, for every dimension, on every worker.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from tests.sameness.checks import replaced
from tests.workers import run_on
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.models.moe import Router
from trainwright.planner.layout import split_layers
from trainwright.planner.memory import state_bytes
from trainwright.planner.plan import Plan
from trainwright.planner.traffic import traffic

ROWS, SEQUENCE = 16, 64
DENSE = new_hf_config(
    "llama",
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": SEQUENCE,
    },
    128,
)  # fmt: skip
TIED = {**DENSE, "tie_word_embeddings": True}
SPARSE = new_hf_config(
    "qwen3_moe",
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": SEQUENCE,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    128,
)  # fmt: skip
LATENT = new_hf_config(
    "deepseek_v3",
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": SEQUENCE,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    128,
)  # fmt: skip

PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replicas": (DENSE, {"dp_replicate": 4}),
    "replicas in bf16": (DENSE, {"dp_replicate": 4, "precision": "bf16"}),
    "zero 1": (DENSE, {"dp_shard": 4, "zero": 1}),
    "zero 2 in bf16": (DENSE, {"dp_shard": 4, "zero": 2, "precision": "bf16"}),
    "zero 3": (DENSE, {"dp_shard": 4, "zero": 3}),
    "zero 3 in bf16": (DENSE, {"dp_shard": 4, "zero": 3, "precision": "bf16"}),
    "replicas of shards": (DENSE, {"dp_replicate": 2, "dp_shard": 2, "zero": 3}),
    "tensor": (DENSE, {"tp": 4}),
    "tensor in bf16": (DENSE, {"tp": 2, "dp_shard": 2, "zero": 3, "precision": "bf16"}),
    "tensor, narrow, alone": (DENSE, {"tp": 4, "precision": "bf16"}),
    "tensor, all recomputed": (DENSE, {"tp": 4, "recompute": "full"}),
    "tensor, some recomputed": (DENSE, {"tp": 4, "recompute": "selective"}),
    "tensor, recomputed by layer": (
        DENSE, {"tp": 2, "pp": 2, "recompute_by_layer": ("full", "selective", "none", "none")}),
    "tensor, whole attention, rows cut": (
        DENSE, {"tp": 2, "dp_replicate": 2, "whole": ("attention",), "micro_batch": 1}),
    "tensor, whole attention, all recomputed": (
        DENSE, {"tp": 2, "dp_replicate": 2, "whole": ("attention",), "micro_batch": 1,
                "recompute": "full"}),
    "tensor, whole attention, whole rows": (DENSE, {"tp": 4, "whole": ("attention",)}),
    "tensor, whole networks, some recomputed": (
        DENSE, {"tp": 4, "whole": ("network",), "recompute": "selective"}),
    "tensor, whole blocks of shards": (
        DENSE, {"tp": 2, "dp_shard": 2, "zero": 3, "whole": ("attention", "network")}),
    "tensor, whole latent attention": (
        LATENT, {"tp": 2, "dp_replicate": 2, "whole": ("attention",), "micro_batch": 1}),
    "ring": (DENSE, {"cp": 4}),
    "ring in bf16": (DENSE, {"cp": 4, "precision": "bf16"}),
    "ring, all recomputed": (DENSE, {"cp": 2, "tp": 2, "recompute": "full"}),
    "ring, some recomputed": (DENSE, {"cp": 4, "recompute": "selective"}),
    "all-gather": (DENSE, {"cp": 4, "cp_method": "all_gather"}),
    "all-gather, all recomputed": (
        DENSE, {"cp": 4, "cp_method": "all_gather", "recompute": "full"}),
    "all-gather, some recomputed": (
        DENSE, {"cp": 4, "cp_method": "all_gather", "recompute": "selective"}),
    "ulysses": (DENSE, {"cp": 4, "cp_method": "ulysses"}),
    "ulysses, some recomputed": (
        DENSE, {"cp": 2, "dp_replicate": 2, "cp_method": "ulysses", "recompute": "selective"}),
    "context and shards": (DENSE, {"cp": 2, "dp_shard": 2, "zero": 3}),
    "1f1b": (DENSE, {"pp": 4}),
    "1f1b in bf16": (DENSE, {"pp": 4, "precision": "bf16"}),
    "interleaved": (DENSE, {"pp": 2, "dp_shard": 2, "zero": 3, "schedule": "interleaved"}),
    "tied in a v": (TIED, {"pp": 2, "tp": 2, "schedule": "zbv"}),
    "tied": (TIED, {"pp": 2, "dp_shard": 2, "zero": 1, "schedule": "zero_bubble"}),
    "experts": (SPARSE, {"dp_shard": 4, "ep": 4, "zero": 3}),
    "experts, all recomputed": (
        SPARSE, {"dp_shard": 4, "ep": 2, "zero": 3, "recompute": "full"}),
    "experts and tensors": (SPARSE, {"dp_shard": 2, "ep": 2, "tp": 2, "zero": 2}),
    "experts and context": (SPARSE, {"cp": 2, "dp_shard": 2, "ep": 2, "zero": 1}),
    "experts in a pipeline": (SPARSE, {"pp": 2, "dp_shard": 2, "ep": 2, "zero": 3}),
    "experts not dealt out": (SPARSE, {"dp_shard": 4, "zero": 3}),
}  # fmt: skip


def plan_of(config: DecoderConfig, fields: dict[str, Any]) -> Plan:
    plan = replace(Plan.alone(), world_size=4, sequence_length=SEQUENCE, **fields)
    virtual = 2 if plan.schedule in ("interleaved", "zbv") else 1
    rows = ROWS // plan.data_ranks
    micro_batch = fields.get("micro_batch", rows // (4 if plan.pp > 1 else 2))
    plan = replace(
        plan,
        virtual_stages=virtual,
        micro_batch=micro_batch,
        accumulation=rows // micro_batch,
    )
    layers = split_layers(config, plan.stages) if plan.pp > 1 else ()
    return replace(plan, stage_layers=layers)


def measure(hf_config: dict[str, Any], plan: Plan, evenly: bool = False) -> dict[str, Any]:
    """On a worker: the second step's traffic, and what the states hold in bytes.

    `evenly`: every expert is picked equally often, instead of as the router wants.
    """
    with replaced(Router, "_choose", one_after_another) if evenly else contextlib.nullcontext():
        return trained(hf_config, plan)


def one_after_another(router: Router, scores: Any) -> Any:
    """As many picks for each expert, however the tokens score them."""
    import torch

    picks = torch.arange(scores[..., 0].numel() * router.spec.per_token, device=scores.device)
    return (picks % router.spec.count).view(*scores.shape[:-1], router.spec.per_token)


def trained(hf_config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from trainwright.comm.local import local
    from trainwright.comm.meter import Meter
    from trainwright.parallel.world import World
    from trainwright.recipe.schema import Recipe
    from trainwright.training.sameness import Trial

    recipe = Recipe.model_validate(
        {
            "model": {"family": "llama", "preset": "4m"},
            "training": {"steps": 2, "precision": plan.precision},
            "data": {"sequence_length": SEQUENCE},
        }
    )
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    trial = Trial(recipe, hf_config, plan, world)
    trial.train(0)
    held: dict[str, Any] = {}

    def weigh() -> None:
        parameters = [p for _, p in trial.model.named_parameters()]
        held["parameters"] = sum(local(p).nbytes for p in parameters)
        held["gradients"] = sum(local(p.grad).nbytes for p in parameters if p.grad is not None)
        held["optimizer"] = sum(
            local(value).nbytes
            for optimizer in trial.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.ndim
        )

    trial.step.gradients_ready = weigh
    with Meter() as meter:
        trial.train(1)
        moved = meter.step()
    held["traffic"] = {
        (name, collective): count
        for name, each in moved.items()
        for collective, count in each.bytes_by_collective.items()
        if count
    }
    held["pp_rank"] = trial.model.mesh.index("pp")
    held["shard"] = trial.model.mesh.index("fsdp")
    return held


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_formulas_are_what_a_step_holds_and_sends(name: str) -> None:
    hf_config, fields = PLANS[name]
    config = decoder_config(hf_config)
    plan = plan_of(config, fields)
    for held in run_on(4, measure, hf_config, plan):
        expected = state_bytes(config, plan, held["pp_rank"])
        if held["shard"] == 0:  # the fullest; the last may have less where rows do not divide
            for kind in ("parameters", "gradients", "optimizer"):
                assert held[kind] == pytest.approx(getattr(expected, kind), rel=0.01), kind
        # The formula for experts is the mean over routings; one step's goes here or there.
        agree(held, config, plan, {"ep": 0.3})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, fields) in PLANS.items() if "ep" in fields])
def test_experts_picked_evenly_send_what_the_formula_says(name: str) -> None:
    hf_config, fields = PLANS[name]
    config = decoder_config(hf_config)
    plan = plan_of(config, fields)
    for held in run_on(4, measure, hf_config, plan, True):
        agree(held, config, plan, {})


def agree(held: dict[str, Any], config: DecoderConfig, plan: Plan, wider: dict[str, float]) -> None:
    """Every dimension's collectives within 5 % of the formula, or within what `wider` says."""
    sent = traffic(config, plan, held["pp_rank"])
    formulas = {key: count for key, count in sent.items() if count and key[0] != "world"}
    measured = {key: count for key, count in held["traffic"].items() if key[0] != "world"}
    assert measured.keys() == formulas.keys()
    for key, count in measured.items():
        assert count == pytest.approx(formulas[key], rel=wider.get(key[0], 0.05)), key
