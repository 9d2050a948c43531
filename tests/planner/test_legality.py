"""The legality table: what it refuses, what it proposes instead, and what it lets through."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.candidate import AXES, Candidate, candidate_of, settled
from trainwright.planner.combinations import dimensions, enumerate_plans
from trainwright.planner.legality import (
    broken_rules,
    distance,
    is_legal,
    legality_mistakes,
    nearest_legal,
)
from trainwright.planner.plan import Plan
from trainwright.planner.rules import RULES
from trainwright.recipe.schema import EIGHT_BIT, PAGED, Adapter, Parallel, Training

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


def dense(**keys: Any) -> DecoderConfig:
    return decoder_config(new_hf_config("llama", {**SHAPE, **keys}, 256))


def sparse(**keys: Any) -> DecoderConfig:
    return decoder_config(new_hf_config("qwen3_moe", {**SHAPE, **EXPERTS, **keys}, 256))


DENSE, SPARSE = dense(), sparse()


def candidate(**fields: Any) -> Candidate:
    """Eight workers on the CPU with a dense model, 16 rows of 96 tokens, unless told otherwise."""
    base: dict[str, Any] = {
        "world": 8, "sequence_length": 96, "rows": 16, "device": "cpu", "model": DENSE,
        "native": True, "has_float8": False, "has_compiler": True,
        "derived": frozenset({"dp_replicate", "dp_shard", "zero", "virtual_stages"}),
    }  # fmt: skip
    given = frozenset(fields)
    return settled(Candidate(**{**base, **fields, "derived": base["derived"] - given}))


# Rule: (a candidate that it alone refuses, what the mistake says, the fix).
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "workers": ({"tp": 2, "dp_shard": 3}, "dp_shard 3 × tp 2 do not divide 8 workers",
                "write `dp_shard: 4`"),
    "own-decoder": ({"native": False, "model": None, "cp": 2}, "transformers' own class",
                    "write `cp: 1`"),
    "own-decoder-dropout": ({"native": False, "model": None, "dropout": 0.1},
                            "no such dropout", "leave `dropout` out"),
    "own-decoder-noise": ({"native": False, "model": None, "neftune_alpha": 5.0},
                          "no such noise", "leave `neftune_alpha` out"),
    "adapter-dropout": ({"tp": 2, "adapter": Adapter(dropout=0.1)}, "adapters with dropout",
                        "write `tp: 1`"),
    "adapter-copies": (
        {"tp": 2, "adapter": Adapter(train_also=["lm_head"]), "keeps_originals": True},
        "copies of layers for the reference", "write `tp: 1`"),
    "adapter-tied": (
        {"pp": 2, "adapter": Adapter(targets=["embed_tokens"]),
         "model": dense(tie_word_embeddings=True)},
        "an adapter on tied embeddings", "write `pp: 1`"),
    "adapter-float8": (
        {"precision": "float8", "has_float8": True, "device": "cuda", "adapter": Adapter()},
        "adapters do not go with float8", "write `precision: bf16`"),
    "quantised-blocks": ({"tp": 2, "adapter": Adapter(quantise="nf4")},
                         "tp 2 would cut blocks of 64", "write `tp: 1`"),
    "tensor-heads": ({"tp": 4, "model": dense(num_attention_heads=6, hidden_size=72)},
                     "4 does not divide the model's 6 heads", "write `whole: [attention]`"),
    "tensor-key-value-heads": (
        {"tp": 4, "model": dense(num_attention_heads=12, num_key_value_heads=6, hidden_size=72)},
        "4 and the model's 6 key-value heads", "write `whole: [attention]`"),
    "tensor-feed-forward": ({"tp": 4, "model": dense(intermediate_size=98)},
                            "intermediate_size 98", "write `whole: [network]`"),
    "whole-tensor": ({"whole": ("attention",)}, "attention cannot be left whole: tp is 1",
                     "leave `whole` out"),
    "whole-context": ({"tp": 2, "cp": 2, "whole": ("attention", "network")},
                      "does not go with cp 2", "write `whole: [network]`"),
    "whole-experts": ({"tp": 2, "whole": ("network",), "model": SPARSE},
                      "a mixture of experts cannot", "leave `whole` out"),
    "tensor-vocabulary": (
        {"tp": 4, "model": decoder_config(new_hf_config("llama", SHAPE, 258))},
        "4 does not divide the vocabulary of 258", "write `tp: 2`"),
    "columns": ({"tp": 2, "cp": 2, "sequence_length": 100},
                "rows of 100 tokens do not divide by 8 (tp 2 × cp 2 × 2)",
                "write `sequence_length: 104`"),
    "ulysses-heads": ({"cp": 8, "tp": 1, "cp_method": "ulysses",
                       "model": dense(num_attention_heads=4)},
                      "4 heads", "write `cp_method: ring`"),
    "experts-model": ({"ep": 2}, "no experts", "write `ep: 1`"),
    "experts-count": ({"ep": 4, "model": SPARSE}, "does not divide the model's 6 experts",
                      "write `ep: 2`"),
    "experts-shards": ({"ep": 2, "dp_shard": 1, "model": SPARSE, "world": 4},
                       "ep 2 does not divide dp_shard 1", "write `dp_shard: 2`"),
    "router": ({"router_keys": ("router_z_loss",)}, "no router", "leave `router_z_loss` out"),
    "router-bias": ({"router_keys": ("router_bias_rate",), "model": SPARSE},
                    "no bias to move", "leave `router_bias_rate` out"),
    "pipeline-layers": ({"pp": 4, "schedule": "zbv"}, "8 pipeline stages are more than",
                        "write `pp: 2`"),
    "virtual-stages": ({"pp": 2, "virtual_stages": 2}, "1f1b has 1 stage a rank",
                       "write `virtual_stages: 1`"),
    "stage-layers": ({"pp": 2, "stage_layers": (3, 4)}, "[3, 4] are 7 layers",
                     "leave `stage_layers` out"),
    "replica-rows": ({"dp_replicate": 2, "rows_by_replica": (12, 6)},
                     "[12, 6] are 18 rows, but the batch has 16",
                     "write `rows_by_replica: [12, 4]`"),
    "recompute-stages": ({"pp": 2, "recompute_by_stage": ("full",)}, "1 entries, but 2 stages",
                         "leave `recompute_by_stage` out"),
    "recompute-layers": ({"recompute_by_layer": ("full", "none")}, "2 entries, but 6 layers",
                         "leave `recompute_by_layer` out"),
    "zero-shards": ({"zero": 2, "dp_replicate": 8}, "dp_shard is 1", "leave `zero` out"),
    "zero-split-backward": ({"pp": 2, "schedule": "zbv", "zero": 3, "dp_shard": 4},
                            "schedule zbv makes weight gradients after", "write `zero: 1`"),
    "offload-shards": ({"offload": "parameters", "dp_replicate": 8}, "dp_shard is 1",
                       "write `dp_replicate: 4`"),
    "eight-bit-cut": ({"optimizer": "adamw-8bit", "tp": 2}, "scales its state by blocks",
                      "write `tp: 1`"),
    "paged-device": ({"optimizer": "paged-adamw-8bit", "device": "cpu"}, "here is no GPU",
                     "write `name: adamw-8bit`"),
    "paged-offload": ({"optimizer": "paged-adamw", "offload": "optimizer", "device": "cuda"},
                      "offload optimizer has it there already", "write `offload: none`"),
    "compiler": ({"compile": True, "has_compiler": False}, "needs a C compiler",
                 "write `compile: auto`"),
    "compile-split-backward": ({"compile": True, "pp": 2, "schedule": "zero_bubble"},
                               "zero_bubble splits", "write `compile: auto`"),
    "budget-compile": ({"compile": False, "recompute": 0.5}, "torch.compile, which is off",
                       "write `compile: auto`"),
    "float8-device": ({"precision": "float8"}, "capability 8.9", "write `precision: bf16`"),
    "rows": ({"rows": 15}, "15 rows do not share out evenly over 8 workers",
             "write `batch_sequences: 16`"),
    "micro-batch": ({"micro_batch": 3, "dp_replicate": 2, "tp": 4, "dp_shard": 1},
                    "3 does not divide the 8 rows", "write `micro_batch: 4`"),
    "micro-batches": ({"pp": 2, "schedule": "dualpipev", "dp_shard": 4, "rows": 8},
                      "needs 4 micro-batches", "write `schedule: zbv`"),
}  # fmt: skip


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_each_rule_refuses_and_proposes(name: str) -> None:
    fields, says, fix = CASES[name]
    asked = candidate(**fields)
    assert [rule.name for rule in broken_rules(asked)] == [name]
    [mistake] = legality_mistakes(asked)
    assert says in mistake.what
    assert mistake.fix.startswith(fix)
    rule = next(rule for rule in RULES if rule.name == name)
    assert mistake.key in rule.concerns or mistake.key == rule.key_of(asked)
    near = nearest_legal(asked)
    assert near is not None and is_legal(near)


@pytest.mark.parametrize(
    ("fields", "says", "fix"),
    [
        ({"dp_replicate": 2, "rows_by_replica": (8, 4, 4)}, "rows of 3 replicas, and there are 2",
         "leave `rows_by_replica` out"),
        ({"dp_replicate": 2, "rows_by_replica": (10, 6)},
         "[10, 6] do not share out evenly over dp_shard 4", "write `rows_by_replica: [12, 4]`"),
        ({"dp_replicate": 2, "rows_by_replica": (16, 0)}, "a replica without rows",
         "write `rows_by_replica: [12, 4]`"),
        ({"dp_replicate": 2, "rows_by_replica": (12, 4), "micro_batch": 3},
         "3 does not divide the 4 rows of a worker", "write `micro_batch: 4`"),
    ],
)  # fmt: skip
def test_rows_of_replicas_that_cannot_be(fields: dict[str, Any], says: str, fix: str) -> None:
    shards = {"tp": 4, "dp_shard": 1} if "micro_batch" in fields else {}
    [mistake] = legality_mistakes(candidate(**fields, **shards))
    assert says in mistake.what
    assert mistake.fix.startswith(fix)


def test_rules_have_names_of_their_own_and_keys_of_the_recipe() -> None:
    from trainwright.recipe.describe import field_at

    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        for key in rule.concerns:
            assert field_at(tuple(key.split("."))) is not None, key


def test_whatever_is_asked_for_the_proposal_is_legal() -> None:
    """Random wishes, most of them illegal in several ways at once."""
    draw = random.Random(5)
    values: dict[str, list[Any]] = {
        "world": [1, 2, 3, 4, 6, 8, 12, 16], "pp": [1, 1, 2, 3, 4], "cp": [1, 1, 2, 4],
        "tp": [1, 1, 2, 3, 8], "ep": [1, 1, 1, 2, 4], "zero": [0, 1, 2, 3],
        "schedule": ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"],
        "virtual_stages": [1, 2, 3], "cp_method": ["ring", "all_gather", "ulysses"],
        "offload": ["none", "optimizer", "parameters"], "recompute": ["none", "full", 0.5],
        "dropout": [0.0, 0.1], "compile": ["auto", True, False],
        "precision": ["bf16", "fp32", "float8"], "optimizer": ["adamw", "muon", *EIGHT_BIT, *PAGED],
        "sequence_length": [96, 100, 64], "rows": [7, 8, 12, 16], "micro_batch": [None, 1, 3],
        "stage_layers": [(), (3, 3), (5, 2)], "recompute_by_stage": [(), ("full", "none")],
        "recompute_by_layer": [(), (), ("full", 0.5) * 3, ("none",) * 4],
        "whole": [(), (), ("attention",), ("attention", "network")],
        "dp_shard": [None, 1, 2, 3], "dp_replicate": [None, 1, 2],
        "rows_by_replica": [(), (), (12, 4), (5, 3), (1, 1, 1)],
        "model": [DENSE, SPARSE, None], "native": [True, True, None, False],
        "has_compiler": [True, False],
    }  # fmt: skip
    illegal = 0
    for _ in range(60):
        wish = {name: draw.choice(options) for name, options in values.items()}
        if wish["native"] is False:
            wish["model"] = None
        free = [name for name in ("zero", "virtual_stages") if draw.random() < 0.5]
        free += ["zero"] if wish["zero"] == 0 else []  # a recipe leaves it out
        free += [name for name in ("dp_shard", "dp_replicate") if wish[name] is None]
        for name in {*free}:
            del wish[name]
        asked = candidate(**wish)
        near = nearest_legal(asked)
        assert near is not None, asked
        assert is_legal(near), near
        mistakes = legality_mistakes(asked)
        assert bool(mistakes) == (not is_legal(asked))
        assert all(mistake.fix and mistake.key for mistake in mistakes)
        illegal += bool(mistakes)
    assert illegal > 45


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_no_legal_layout_is_nearer_than_the_proposal(model: DecoderConfig) -> None:
    """Against all degrees there are, for wishes that degrees alone can mend."""
    every = [
        candidate(pp=pp, dp_replicate=r, dp_shard=s, cp=cp, tp=tp, ep=ep, model=model)
        for pp, r, s, cp, tp in itertools.product((1, 2, 4, 8), repeat=5)
        if pp * r * s * cp * tp == 8
        for ep in (1, 2, 4, 8)
    ]
    legal = [each for each in every if is_legal(each)]
    assert 20 < len(legal) < len(every)
    for asked in every[:: max(1, len(every) // 60)]:
        near = nearest_legal(asked)
        assert near is not None
        best = min(distance(asked, other) for other in legal)
        assert distance(asked, near) <= best + 1e-9


def test_the_recipe_alone_is_checked_on_the_fewest_workers_that_could_do() -> None:
    training = Training(steps=1)
    for parallel, names in (
        (Parallel(tp=2, cp=2, pp=2, zero=2), []),
        (Parallel(tp=3), ["tensor-heads", "tensor-key-value-heads", "tensor-vocabulary"]),
        (Parallel(ep=2, dp_shard=3), ["experts-model", "experts-shards"]),
        (Parallel(zero=1, dp_shard=1), ["zero-shards"]),
    ):
        asked = candidate_of(
            parallel, training, world=None, sequence_length=96, model=DENSE, native=True
        )
        assert [rule.name for rule in broken_rules(asked)] == names


def test_what_is_left_out_is_derived() -> None:
    training = Training(steps=1, batch_sequences=16)

    def of(**keys: Any) -> tuple[int, int, int, int]:
        asked = candidate_of(Parallel(**keys), training, world=8, device="cpu")
        assert is_legal(asked)
        return asked.dp_replicate, asked.dp_shard, asked.zero, asked.virtual_stages

    assert of() == (8, 1, 0, 1)
    assert of(tp=2) == (4, 1, 0, 1)
    assert of(tp=2, zero=2) == (1, 4, 2, 1)
    assert of(dp_shard=2) == (4, 2, 3, 1)
    assert of(ep=2, cp=2) == (1, 4, 3, 1)
    assert of(offload="parameters") == (1, 8, 3, 1)
    assert of(pp=2, schedule="interleaved") == (4, 1, 0, 2)
    assert of(pp=2, schedule="zbv", dp_shard=4) == (1, 4, 1, 2)
    assert of(schedule="zbv") == (8, 1, 0, 1)


def test_all_plans_for_eight_workers() -> None:
    plans = enumerate_plans(DENSE, 8, sequence_length=96, batch_sequences=16)
    assert len(set(plans)) == len(plans) > 80
    assert plans == enumerate_plans(DENSE, 8, sequence_length=96, batch_sequences=16)
    seen = {name for plan in plans for name in dimensions(plan)}
    assert seen == {"pp", "dp_replicate", "dp_shard", "cp", "tp"}
    assert {plan.schedule for plan in plans} == {
        "gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"
    }  # fmt: skip
    assert {plan.zero for plan in plans} == {0, 1, 2, 3}
    assert {plan.cp_method for plan in plans} == {"ring", "all_gather", "ulysses"}
    assert sum(len(dimensions(plan)) >= 3 for plan in plans) >= 25
    for plan in plans:
        assert plan.batch_sequences == 16
        assert is_legal(candidate_of_plan(plan, DENSE))
        assert plan.pp == 1 or (len(plan.stage_layers), sum(plan.stage_layers)) == (plan.stages, 6)
    with_experts = enumerate_plans(SPARSE, 8, sequence_length=96, batch_sequences=16)
    assert sum(plan.ep > 1 for plan in with_experts) >= 30


def candidate_of_plan(plan: Plan, model: DecoderConfig) -> Candidate:
    """What a finished plan amounts to."""
    same = (
        *AXES, "zero", "schedule", "virtual_stages", "stage_layers", "cp_method", "offload",
        "recompute", "recompute_by_stage", "recompute_by_layer", "compile", "precision",
        "optimizer", "sequence_length", "micro_batch", "device", "rows_by_replica",
    )  # fmt: skip
    fields = {name: getattr(plan, name) for name in same}
    return Candidate(
        world=plan.world_size, rows=plan.batch_sequences, model=model, native=True, **fields
    )


def test_a_plan_that_no_rule_allows_is_known() -> None:
    plan = replace(Plan.alone(), world_size=2, tp=2, sequence_length=96)
    assert is_legal(candidate_of_plan(plan, DENSE))
    assert not is_legal(candidate_of_plan(replace(plan, tp=1), DENSE))
    assert not is_legal(candidate_of_plan(replace(plan, sequence_length=97), DENSE))


def test_nearest_for_a_large_world_is_found_in_a_moment() -> None:
    asked = candidate(world=4096, tp=24, pp=10, cp=3, rows=4096, schedule="zbv")
    near = nearest_legal(asked)
    assert near is not None and is_legal(near)
