"""A step's cost: work against FLOPs as they are counted, traffic against its own exact formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.beside import Beside
from trainwright.planner.cluster.catalogue import device, link
from trainwright.planner.cluster.describe import Cluster, Pool, Rates
from trainwright.planner.cost.calls import (
    Call,
    boundary_bytes,
    context_calls,
    expert_calls,
    tensor_calls,
)
from trainwright.planner.cost.kernels import Kernels, quantisation
from trainwright.planner.cost.operators import Product, head_operators, layer_operators
from trainwright.planner.cost.step import predict, step_time
from trainwright.planner.job import Job
from trainwright.planner.layout import split_layers
from trainwright.planner.plan import Plan
from trainwright.planner.shapes import flops_per_token
from trainwright.planner.traffic import gathered, reduced, traffic
from trainwright.recipe.schema import Adapter

LENGTH = 256


def config_of(family: str = "llama", **keys: Any) -> DecoderConfig:
    """A small decoder whose sizes any degree here divides."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    vocabulary = keys.pop("vocab_size", 1024)
    return decoder_config(new_hf_config(family, sizes | keys, vocabulary))


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
WIDE = config_of(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)
CONFIGS = {
    "grouped": config_of(),
    "window": config_of("mistral", sliding_window=100),
    "mixture": config_of("qwen3_moe", **MIXTURE),
    "latent": config_of("deepseek_v3", **LATENT),
}


def plan_of(config: DecoderConfig, world: int = 8, **fields: Any) -> Plan:
    """A plan of `world` workers, replicas where nothing else is said."""
    degrees = {name: fields.pop(name, 1) for name in ("pp", "dp_shard", "cp", "tp", "ep")}
    taken = degrees["pp"] * degrees["dp_shard"] * degrees["cp"] * degrees["tp"]
    values: dict[str, Any] = {
        "world_size": world,
        "dp_replicate": world // taken,
        "micro_batch": 2,
        "accumulation": 8,
        "threads": 1,
        "precision": "bf16",
        "recompute": "none",
        "compile": False,
        "device": "cuda",
        "sequence_length": LENGTH,
        "optimizer": "adamw",
        "zero": 3 if degrees["dp_shard"] > 1 else 0,
        **degrees,
        **fields,
    }
    stages = values["pp"] * values.get("virtual_stages", 1)
    if values["pp"] > 1 and "stage_layers" not in values:
        values["stage_layers"] = (config.num_layers // stages,) * stages
    return Plan(**values)


def job_of(config: DecoderConfig, plan: Plan) -> Job:
    return Job(config, plan.sequence_length, plan.batch_sequences, imbalance=1.0)


def cluster_of(devices: int = 8, rates: Rates | None = None, **fields: Any) -> Cluster:
    """Nodes of eight H100."""
    per_node = min(8, devices)
    pool = Pool(
        "h100",
        device("H100-SXM"),
        devices // per_node,
        per_node,
        link("NVLink-4"),
        link("InfiniBand-NDR"),
        rates=rates or Rates(),
    )
    return Cluster("test", (replace(pool, **fields),))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("degrees", [{}, {"tp": 4}, {"cp": 4}, {"dp_shard": 8, "ep": 4}])
def test_all_workers_products_are_the_models_flops(name: str, degrees: dict[str, int]) -> None:
    config = CONFIGS[name]
    plan = plan_of(config, **degrees)
    if plan.ep > 1 and config.experts is None:
        pytest.skip("no experts")
    job = job_of(config, plan)
    every = [layer_operators(job, plan, layer) for layer in range(config.num_layers)]
    head = head_operators(job, plan)
    products = sum(product.flops for each in [*every, head] for product in each.products)
    attention = sum(each.attention.flops for each in every if each.attention)
    groups = plan.world_size / (plan.tp * plan.cp)  # each has other tokens
    tokens = plan.micro_batch * LENGTH * groups
    expected = (flops_per_token(config, LENGTH) + (plan.tp - 1) * _whole(config)) * tokens
    assert (products + attention) * plan.world_size == pytest.approx(expected, rel=1e-9)


def _whole(config: DecoderConfig) -> float:
    """FLOPs a token of what tp leaves whole: routers, and the ways down to latent vectors."""
    flops, spec, latent = 0.0, config.experts, config.latent
    if spec is not None:
        flops += sum(spec.layers) * 2 * config.hidden_size * spec.count
    if latent is not None:
        ranks = latent.rank + latent.rope_dim + (latent.query_rank or 0)
        flops += config.num_layers * 2 * config.hidden_size * ranks
    return flops


def _bytes(calls: list[Call], workers: int) -> float:
    """What a worker sends in all calls, by ring algorithms."""
    each = {
        "all_gather": gathered,
        "reduce_scatter": gathered,
        "all_to_all": gathered,
        "all_reduce": reduced,
        "send": lambda size, _: size,
    }
    return sum(call.times * each[call.kind](call.size, workers) for call in calls)


@pytest.mark.parametrize("name", CONFIGS)
def test_calls_send_what_the_traffic_formulas_count(name: str) -> None:
    config = CONFIGS[name]
    plan = plan_of(config, tp=4)
    job, sent = job_of(config, plan), traffic(config, plan)
    layers = 2 * config.num_layers * plan.accumulation  # there and back
    whole = _bytes(tensor_calls(job, plan), 4) * layers
    stream = plan.micro_batch * LENGTH * config.hidden_size * 2
    ends = plan.accumulation * 2 * gathered(stream, 4)  # embedding and head, there and back
    ends += plan.accumulation * 2 * gathered(stream, 4)  # the embedding's are in fp32
    found = sent["tp", "all_gather"] + sent["tp", "reduce_scatter"]
    assert whole + 1.5 * ends == pytest.approx(found, rel=1e-9)

    plan = plan_of(config, cp=4, cp_method="all_gather")
    job, sent = job_of(config, plan), traffic(config, plan)
    there = _bytes(context_calls(job, plan), 4) * config.num_layers * plan.accumulation
    assert there == pytest.approx(sent["cp", "all_gather"], rel=1e-9)

    plan = plan_of(config, cp=4, cp_method="ring")
    job, sent = job_of(config, plan), traffic(config, plan)
    there = _bytes(context_calls(job, plan), 4) * config.num_layers * plan.accumulation
    # Back, keys and values go again, and their gradients in fp32 for the 16 bits of theirs.
    assert there * (1 + 1 + 2) == pytest.approx(sent["cp", "send"], rel=1e-9)

    if config.experts is not None:
        plan = plan_of(config, dp_shard=8, ep=4)
        job, sent = job_of(config, plan), traffic(config, plan)
        calls = [call for layer in range(8) for call in expert_calls(job, plan, layer)]
        sparse = sum(config.experts.layers)
        counts = sparse * plan.accumulation * gathered(8 * config.experts.count, 4)
        there = _bytes(calls, 4) * plan.accumulation
        assert 2 * there + counts == pytest.approx(sent["ep", "all_to_all"], rel=1e-9)


def test_boundaries_send_what_the_traffic_formulas_count() -> None:
    config = CONFIGS["grouped"]
    plan = plan_of(config, pp=4, tp=2)
    job = job_of(config, plan)
    sent = traffic(config, plan, 1)["pp", "send"]
    assert 2 * plan.accumulation * boundary_bytes(job, plan) == pytest.approx(sent)


def test_quantisation_is_the_last_waves_waste() -> None:
    a100 = device("A100-80G-SXM")
    # 108 tiles of 128 × 256 are one wave; one tile more makes it two.
    assert quantisation(128 * 108, 256, 1, a100) == pytest.approx(1.0)
    for tiles in (1, 54, 107, 108, 109, 150, 216, 1000):
        waves = -(-tiles // 108)
        own = tiles / (108 * waves)
        assert quantisation(128 * tiles, 256, 1, a100) >= own - 1e-9
    just_over = quantisation(128 * 109, 256, 1, a100)
    assert 0.5 < just_over < 0.99  # smaller tiles save some of it, and reach less
    # BigScience's chronicles: of hidden 14,400 and 13,824 over tp 8 the first is the slower.
    slow, fast = (quantisation(2048, 4 * hidden / 8, 1, a100) for hidden in (14400, 13824))
    assert slow < fast


def test_a_head_width_that_tensor_cores_cannot_load_is_slow() -> None:
    kernels = Kernels(device("A100-80G-SXM"), Rates())
    even, odd = (
        kernels.product(Product(2048, 2048, width, 32.0), "fp16") / width for width in (112, 108)
    )
    assert odd > 2 * even


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2)])
def test_idle_time_is_the_closed_formulas(schedule: str, virtual: int) -> None:
    """(p − 1)(F + B) / v, where stages are equal and sending takes no time."""
    config = config_of(num_hidden_layers=16, intermediate_size=4096)
    fast = replace(link("NVLink-4"), latency=0.0, up=1e18, down=1e18)
    cluster = cluster_of(rates=Rates(pass_seconds=1.0, kernel_seconds=0.0), inside=fast)
    plan = plan_of(config, pp=4, schedule=schedule, virtual_stages=virtual, dp_replicate=2)
    found = step_time(job_of(config, plan), plan, cluster)
    # A pass takes a second, beside which the rest is nothing.
    expected = (plan.pp - 1) * 2
    assert found.idle == pytest.approx(expected, rel=0.02)


def test_more_workers_compute_less_each_and_talk() -> None:
    config = WIDE
    alone = plan_of(config, world=1, sequence_length=4096)
    whole = predict(job_of(config, alone), alone, cluster_of(1))
    for degrees in ({"tp": 4}, {"cp": 4}, {"pp": 4}):
        plan = plan_of(config, world=4, sequence_length=4096, **degrees)
        cut = predict(job_of(config, plan), plan, cluster_of(4))
        assert whole.compute / 4.2 < cut.compute < whole.compute / 2.8
        assert cut.step_seconds.value > whole.step_seconds.value / 4


def test_parts_make_up_the_step() -> None:
    config = CONFIGS["mixture"]
    plan = plan_of(config, pp=2, tp=2, dp_shard=2, ep=2)
    found = predict(job_of(config, plan), plan, cluster_of())
    parts = found.compute + sum(found.exposed.values()) + found.idle
    parts += found.optimizer + found.constant
    assert parts == pytest.approx(found.step_seconds.value, rel=1e-9)
    assert found.step_seconds.low < found.step_seconds.value < found.step_seconds.high


def test_recomputing_costs_a_forward_pass() -> None:
    config = CONFIGS["grouped"]
    plain = plan_of(config, world=1, dp_replicate=1)
    again = replace(plain, recompute="full")
    job, cluster = job_of(config, plain), cluster_of(1)
    first, second = (step_time(job, each, cluster).busiest for each in (plain, again))
    layers = sum(
        sum(Kernels(device("H100-SXM"), Rates()).product(p, "bf16") for p in each.products)
        for each in (layer_operators(job, plain, layer) for layer in range(config.num_layers))
    )
    assert second.products - first.products == pytest.approx(plain.accumulation * layers)


def test_links_within_nodes_and_between_reach_their_own_shares() -> None:
    plan = plan_of(WIDE, world=16, tp=8, sequence_length=4096)
    job = job_of(WIDE, plan)

    def exposed(**rates: float) -> dict[str, float]:
        return step_time(job, plan, cluster_of(16, Rates(**rates))).busiest.exposed

    plain, slow_links, slow_network = exposed(), exposed(links=0.4), exposed(networks=0.35)
    assert slow_links["tp"] == pytest.approx(2 * plain["tp"], rel=0.1)
    assert slow_links["replicas"] == pytest.approx(plain["replicas"], rel=0.01)
    assert slow_network["replicas"] > 1.5 * plain["replicas"]  # less of it is hidden
    assert slow_network["tp"] == plain["tp"]


def test_a_reference_costs_a_forward_pass() -> None:
    """As a model of its own, or as the trained one without its adapter; a cached one nothing."""
    config = CONFIGS["grouped"]
    plan = plan_of(config, pp=2, tp=2)
    job, cluster = job_of(config, plan), cluster_of()
    plain = step_time(job, plan, cluster).busiest
    own = step_time(replace(job, own_passes=1), plan, cluster).busiest
    named = Beside("objective.reference", config)
    second = step_time(replace(job, beside=named), plan, cluster).busiest
    cached = step_time(replace(job, beside=replace(named, stays=False)), plan, cluster).busiest
    assert own.compute == pytest.approx(second.compute)
    # A backward pass is about two forward passes.
    assert own.products == pytest.approx(plain.products * 4 / 3, rel=0.05)
    assert cached.total == plain.total


def test_packed_documents_leave_less_attention() -> None:
    # Windows of 100 tokens hide what lies beyond them anyway.
    for family, share in (("grouped", 0.25), ("window", 1.0)):
        config = CONFIGS[family]
        plan = plan_of(config)
        whole, packed = (
            layer_operators(replace(job_of(config, plan), visible_share=each), plan, 0).attention
            for each in (1.0, 0.25)
        )
        assert whole is not None and packed is not None
        assert packed.flops == pytest.approx(share * whole.flops)


def test_a_frozen_model_has_no_gradients_of_weights() -> None:
    config = WIDE
    plan = plan_of(config, world=1, sequence_length=4096)
    job, cluster = job_of(config, plan), cluster_of(1)
    whole = step_time(job, plan, cluster)
    adapted = step_time(replace(job, adapter=Adapter(rank=16)), plan, cluster)
    # Two thirds, and the adapter's own products, which are thin and slow.
    assert 2 / 3 < adapted.busiest.products / whole.busiest.products < 0.8
    assert adapted.optimizer < 0.1 * whole.optimizer


def test_the_slower_pool_sets_the_step() -> None:
    config = WIDE
    plan = plan_of(config, sequence_length=4096)
    slow = replace(cluster_of(4).pools[0], name="slow", device=device("L40S"))
    fast = replace(slow, name="fast", device=device("H100-SXM"))
    both = Cluster("both", (fast, slow), wide=link("InfiniBand-NDR"))
    times = [step_time(job_of(config, plan), plan, each).total for each in (cluster_of(), both)]
    assert times[1] > 1.5 * times[0]
    # Rows by speed make up for it.
    shares = (3, 3, 3, 3, 1, 1, 1, 1)
    uneven = replace(plan, rows_by_replica=tuple(8 * share for share in shares))
    even = replace(plan, rows_by_replica=(16,) * 8)
    seconds = [step_time(job_of(config, each), each, both).total for each in (even, uneven)]
    assert seconds[1] < 0.8 * seconds[0]


def test_layers_are_split_by_the_time_they_take() -> None:
    """A head as heavy as several layers makes its stage the slowest, which the step shows."""
    config = config_of(vocab_size=131072)
    even = plan_of(config, world=4, pp=4)
    fair = replace(even, stage_layers=split_layers(config, 4))
    job, cluster = job_of(config, even), cluster_of(4)
    assert step_time(job, fair, cluster).total < step_time(job, even, cluster).total
