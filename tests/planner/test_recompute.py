"""The integer program of what to recompute, against every choice there is."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.cluster.catalogue import device, link
from trainwright.planner.cluster.describe import Cluster, Pool
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.step import predict
from trainwright.planner.explain import explain_plan
from trainwright.planner.job import Job
from trainwright.planner.layout import split_layers
from trainwright.planner.memory import activation_bytes, in_flight, layer_bytes
from trainwright.planner.parameters import layers_of, stages_of
from trainwright.planner.plan import Plan, Recompute
from trainwright.planner.schedules import SCHEDULES, schedule_mistakes
from trainwright.planner.search.recompute import fit_recompute, recompute_seconds
from trainwright.planner.search.recompute_program import POLICIES, least_recompute
from trainwright.recipe.presets import PRESETS

SHAPE = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 6,
}  # fmt: skip
DENSE = decoder_config(new_hf_config("llama", SHAPE, 300))
# Two plain layers, then a mixture of experts.
SPARSE = decoder_config(
    new_hf_config(
        "deepseek_v3",
        {
            **SHAPE, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "moe_intermediate_size": 48, "first_k_dense_replace": 2, "q_lora_rank": 24,
            "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        300,
    )
)  # fmt: skip


def plan_of(config: DecoderConfig, **fields: Any) -> Plan:
    """Eight micro-batches of two rows of 128 tokens."""
    plan = replace(Plan.alone(), micro_batch=2, accumulation=8, sequence_length=128, **fields)
    if plan.pp == 1:
        return plan
    return replace(plan, world_size=plan.pp, stage_layers=split_layers(config, plan.stages))


def seconds(layer: int, policy: Recompute, heavy: float = 1.0) -> float:
    """Every third layer, as those that attend to all tokens, takes `heavy` times as long."""
    times = heavy if layer % 3 == 2 else 1.0
    return times * {"none": 0.0, "selective": 0.13, "full": 1.0}[str(policy)]


def added(plan: Plan, config: DecoderConfig, pp_rank: int, heavy: float = 1.0) -> float:
    return sum(
        seconds(layer, plan.layer_recompute(layer, stage), heavy)
        for stage in stages_of(plan, pp_rank)
        for layer in layers_of(config, plan, stage)
    )


def held(config: DecoderConfig, plan: Plan, pp_rank: int) -> float:
    return plan.micro_batch * activation_bytes(config, plan, pp_rank)


def every_choice(config: DecoderConfig, plan: Plan) -> Iterator[Plan]:
    for policies in itertools.product(POLICIES, repeat=config.num_layers):
        yield replace(plan, recompute_by_layer=policies)


def rooms(config: DecoderConfig, plan: Plan, shares: tuple[float, ...]) -> list[dict[int, float]]:
    """Budgets by rank: shares of the way from all recomputed to nothing."""
    least, most = (
        [held(config, replace(plan, recompute=policy), rank) for rank in range(plan.pp)]
        for policy in ("full", "none")
    )
    return [
        {
            rank: low + share * (high - low)
            for rank, (low, high) in enumerate(zip(least, most, strict=True))
        }
        for share in shares
    ]


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DENSE, {}),
        (SPARSE, {}),
        (DENSE, {"pp": 2}),
        (SPARSE, {"pp": 2, "schedule": "gpipe"}),
        (DENSE, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
        (DENSE, {"pp": 2, "schedule": "zbv", "virtual_stages": 2}),
    ],
    ids=["dense", "sparse", "1f1b", "gpipe", "interleaved", "zbv"],
)
def test_no_choice_that_fits_adds_less(config: DecoderConfig, fields: dict[str, Any]) -> None:
    """Against all 729: the seconds of each rank, within the solver's gap."""
    plan = plan_of(config, **fields)
    choices = [
        [(held(config, each, rank), added(each, config, rank)) for rank in range(plan.pp)]
        for each in every_choice(config, plan)
    ]
    for room in rooms(config, plan, (0.0, 0.1, 0.35, 0.6, 0.85, 1.0)):
        found = least_recompute(config, plan, room.__getitem__, seconds)
        assert found is not None
        for rank in range(plan.pp):
            fitting = [
                cost for choice in choices for size, cost in [choice[rank]] if size <= room[rank]
            ]
            assert held(config, found, rank) <= room[rank]
            assert added(found, config, rank) == pytest.approx(min(fitting), rel=2e-4)


def test_never_over_the_budget_nor_slower_than_recomputing_all() -> None:
    """Random shapes, schedules, costs and budgets."""
    draw = random.Random(7)
    chosen = Counter[str]()
    for _ in range(60):
        shape = {**SHAPE, "num_hidden_layers": draw.randrange(4, 24)}
        shape["intermediate_size"] = 16 * draw.randrange(4, 30)
        config = decoder_config(new_hf_config(draw.choice(["llama", "gemma2"]), shape, 300))
        schedule = draw.choice(list(SCHEDULES))
        pp, virtual = draw.choice([1, 2, 4]), draw.choice([1, 2])
        if pp * virtual > config.num_layers or schedule_mistakes(schedule, pp, virtual, 8):
            continue
        pipeline = {"pp": pp, "schedule": schedule, "virtual_stages": virtual} if pp > 1 else {}
        plan, heavy = plan_of(config, **pipeline), draw.uniform(1, 4)
        (room,) = rooms(config, plan, (draw.random(),))
        found = least_recompute(config, plan, room.__getitem__, lambda *a, h=heavy: seconds(*a, h))
        assert found is not None
        full = replace(plan, recompute="full")
        for rank in range(plan.pp):
            assert held(config, found, rank) <= room[rank]
            assert added(found, config, rank, heavy) <= added(full, config, rank, heavy)
        chosen.update(map(str, found.recompute_by_layer))
        chosen[schedule] += 1
    assert all(chosen[name] for name in (*map(str, POLICIES), *SCHEDULES)), chosen


def test_what_fits_is_left_alone_and_what_cannot_fit_is_refused() -> None:
    plan = plan_of(DENSE, pp=2)
    most, least = (
        [held(DENSE, replace(plan, recompute=policy), rank) for rank in (0, 1)]
        for policy in ("none", "full")
    )
    before = replace(plan, recompute_by_stage=("full", "selective"))
    assert least_recompute(DENSE, before, most.__getitem__, seconds) == plan
    # The last layer of all is needed whole at once, with one micro-batch under way.
    full = least_recompute(DENSE, plan, least.__getitem__, seconds)
    assert full == replace(plan, recompute_by_layer=("full",) * 5 + ("none",))
    assert least_recompute(DENSE, plan, lambda rank: least[rank] - 1, seconds) is None


def test_the_first_stage_recomputes_most_and_the_first_layers_first() -> None:
    """1F1B holds pp - i micro-batches on rank i; who recomputes goes before who does not."""
    deep = decoder_config(new_hf_config("llama", {**SHAPE, "num_hidden_layers": 32}, 300))
    plan = replace(plan_of(deep, pp=4), stage_layers=(8, 8, 8, 8))
    room = held(deep, replace(plan, recompute="full"), 0) * 1.6
    found = least_recompute(deep, plan, lambda rank: room, seconds)
    assert found is not None
    costs = [added(found, deep, rank) for rank in range(4)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[3] + 0.1
    for stage in range(4):
        own = [POLICIES.index(found.recompute_by_layer[n]) for n in layers_of(deep, found, stage)]
        assert own == sorted(own)
    words = dict(explain_plan(found, deep))["recompute"]
    assert (
        words.startswith("by layer: ") and sum(map(int, filter(str.isdigit, words.split()))) == 32
    )


def test_what_is_brought_back_goes_into_memory_that_later_layers_have_freed() -> None:
    """By replaying a backward pass, layer by layer, for any order of policies."""
    draw = random.Random(3)
    for schedule, many in (("1f1b", 1), ("1f1b", 4), ("gpipe", 3)):
        plan = replace(plan_of(DENSE, pp=2, schedule=schedule), accumulation=many)
        for _ in range(20):
            policies = tuple(draw.choice(POLICIES) for _ in range(6))
            own = replace(plan, recompute_by_layer=policies)
            for rank in range(2):
                kept = {
                    n: layer_bytes(DENSE, own, n, policies[n]) for n in layers_of(DENSE, own, rank)
                }
                whole = {n: layer_bytes(DENSE, own, n, "none") for n in kept}
                head = 4 * (2 * 64 + 2 * 64) if rank == 1 else 0
                under_way = len(in_flight(own, rank)) * (sum(kept.values()) + head)
                most, now = under_way, under_way
                for layer in reversed(kept):
                    most = max(most, now - kept[layer] + whole[layer])
                    now -= kept[layer]
                assert activation_bytes(DENSE, own, rank) == pytest.approx(128 * most)


def cluster_of(memory: float, devices: int = 8) -> Cluster:
    a100 = replace(device("A100-80G-SXM"), memory_bytes=memory)
    pool = Pool("here", a100, 1, devices, link("NVLink-3"), link("InfiniBand-HDR"))
    return Cluster("here", (pool,))


LLAMA = decoder_config(new_hf_config("llama", PRESETS["llama"]["1b"], 32_000))


@pytest.mark.parametrize(
    "fields", [{}, {"pp": 4, "accumulation": 8}, {"tp": 4}], ids=["alone", "pipeline", "tensor"]
)
def test_a_plan_is_made_to_fit_at_less_than_full_recompute_costs(fields: dict[str, Any]) -> None:
    """By the whole cost model, where 40 % of the memory is lacking."""
    fields = {"precision": "bf16", "sequence_length": 4096, "micro_batch": 4, **fields}
    plan = replace(
        Plan.alone("cuda"), **fields, world_size=fields.get("pp", 1) * fields.get("tp", 1)
    )
    if plan.pp > 1:
        plan = replace(plan, stage_layers=split_layers(LLAMA, plan.pp))
    job = Job(LLAMA, 4096, plan.batch_sequences)
    vast = cluster_of(1e15)
    needed = predict_memory(job, plan, vast).total.value
    short = cluster_of(0.6 * needed)
    full = replace(plan, recompute="full")
    found = fit_recompute(job, plan, short)
    assert found is not None and found.recompute_by_layer
    assert not predict_memory(job, plan, short).fits and predict_memory(job, found, short).fits
    free, mixed, whole = (predict(job, p, short).step_seconds.value for p in (plan, found, full))
    assert free < mixed < whole and mixed < 1.25 * free
    assert fit_recompute(job, full, vast) == plan
    assert fit_recompute(job, plan, vast, limit=0.6 * needed) == found
    for share in (0.5, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        found = fit_recompute(job, plan, vast, limit=share * needed)
        if found is not None:
            assert predict_memory(job, found, vast).total.value <= share * needed
            assert predict(job, found, vast).step_seconds.value < whole
    least = predict_memory(job, full, vast).total.value
    assert fit_recompute(job, plan, cluster_of(0.99 * least)) is None
    assert fit_recompute(job, plan, cluster_of(1.001 * least)) is not None


def test_seconds_are_those_of_the_cost_model() -> None:
    """What all layers add one by one is what a plan adds that recomputes in all of them."""
    plan = replace(Plan.alone("cuda"), precision="bf16", sequence_length=4096, world_size=2, tp=2)
    job, cluster = Job(LLAMA, 4096, 1), cluster_of(80e9)
    added = recompute_seconds(job, plan, cluster)
    plain = predict(job, plan, cluster).step_seconds.value
    for policy in POLICIES:
        own = predict(job, replace(plan, recompute=policy), cluster).step_seconds.value
        total = sum(added(layer, policy) for layer in range(LLAMA.num_layers))
        assert total == pytest.approx(own - plain, rel=1e-3, abs=1e-9)
