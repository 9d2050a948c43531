"""What the sharding program finds: Megatron's cuts, and nothing worse where those cannot be.

Held against counts of parameters and FLOPs, the closed formulas of traffic, and brute force.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.conditions import cut_badly
from trainwright.planner.cost.kernels import Kernels
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.cut import choose_whole, planned_sharding
from trainwright.planner.search.graph import Graph, decoder_graph, layer_of
from trainwright.planner.search.sharding import PARTIAL, WHOLE, Choice, Line, Sharding, conversion
from trainwright.planner.search.sharding_words import alternatives, sharding_lines
from trainwright.planner.shapes import count_parameters, flops_per_token
from trainwright.planner.traffic import traffic

DEVICE = DeviceKind("device", "cuda", 80e9, {"bf16": 500e12, "fp32": 60e12}, 2e12, 500, 100, 132)
FAST = Link("fast", 1e-6, 300e9, 300e9)
MACHINE = Cluster("machine", (Pool("pool", DEVICE, 1, 8, FAST, FAST),))
LATENT = {
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "moe_intermediate_size": 128, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "num_key_value_heads": 8,
}  # fmt: skip


def config_of(family: str = "llama", vocabulary: int = 32_000, **keys: Any) -> DecoderConfig:
    shape = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8,
    }  # fmt: skip
    if family == "deepseek_v3":
        del shape["head_dim"]
        shape = {**shape, "num_attention_heads": 8, **LATENT}
    return decoder_config(new_hf_config(family, {**shape, **keys}, vocabulary))


def collective_seconds(kind: str, size: float, workers: int) -> float:
    """A ring's: an all-reduce is two of the others."""
    steps = (2 if kind == "all_reduce" else 1) * (workers - 1)
    return steps * (2e-6 + size / workers / 300e9)


def line_of(workers: int, **more: Any) -> Line:
    kernels = Kernels(DEVICE, Rates())
    return Line(
        workers, kernels, lambda kind, size: collective_seconds(kind, size, workers), **more
    )


def solved(config: DecoderConfig, workers: int, rows: int = 1, **more: Any) -> Choice:
    sharding = Sharding(decoder_graph(config, rows, 4096), line_of(workers), **more)
    choice = sharding.solve()
    assert choice is not None
    return choice


def cuts(choice: Choice, layer: int = 0) -> dict[str, str | None]:
    """The axis that each operator of a layer, or outside of all, is cut along."""
    graph = choice.sharding.graph
    here = (n for n in graph.operators if not n.startswith("layers.") or f".{layer}." in n)
    return {layer_of(name): choice[name].axis for name in here}


FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma2", {"sliding_window": 512}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 512}),
    ("deepseek_v3", {}),
]


@pytest.mark.parametrize(("family", "keys"), FAMILIES)
def test_the_graph_has_the_models_weights_and_flops(family: str, keys: dict[str, Any]) -> None:
    config, length = config_of(family, **keys), 1024
    graph = decoder_graph(config, 2, length)
    operators = graph.operators.values()
    weights = sum(o.times * graph.size(o.weight) for o in operators if o.weight and o.counted)
    assert weights == pytest.approx(count_parameters(config).total, rel=2e-3)  # without biases
    sharding = Sharding(graph, line_of(2))
    flops = sum(o.times * work(sharding, name) for name, o in graph.operators.items())
    assert flops == pytest.approx(2 * length * flops_per_token(config, length), rel=2e-3)


def work(sharding: Sharding, name: str) -> float:
    operator = sharding.graph.operators[name]
    if operator.kind == "product":
        return sharding.product(operator).flops
    if operator.kind == "attention":
        return sharding.scores(operator).flops
    return 0.0


@pytest.mark.parametrize("workers", range(2, 9))
def test_columns_then_rows_are_found(workers: int) -> None:
    config = config_of(
        vocabulary=840 * 64,
        num_attention_heads=4 * workers,
        num_key_value_heads=workers,
        hidden_size=512 * workers,
        intermediate_size=2048 * workers,
        tie_word_embeddings=True,
    )
    length = 840 * 4  # whose parts are as many as any number of workers
    graph = decoder_graph(config, 1, length)
    choice = Sharding(graph, line_of(workers)).solve()
    assert choice is not None
    found = cuts(choice)
    assert {name: found[f"self_attn.{name}"] for name in ("q_proj", "attention", "o_proj")} == {
        "q_proj": "heads", "attention": "heads", "o_proj": "heads"
    }  # fmt: skip
    assert found["self_attn.k_proj"] == found["self_attn.v_proj"] == "kv_heads"
    assert {found[f"mlp.{name}"] for name in ("gate_proj", "up_proj", "down_proj")} == {"channels"}
    # The vocabulary, and between the halves the sequence.
    assert found["embed_tokens"] == found["lm_head"] == found["loss"] == "vocabulary"
    assert found["self_attn.norm"] == found["mlp.add"] == "sequence"
    assert choice.relaxed


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 4096}),
        ("deepseek_v3", {"moe_intermediate_size": 2048, "n_routed_experts": 16}),
    ],
)
def test_experts_are_dealt_out(family: str, keys: dict[str, Any], workers: int) -> None:
    config = config_of(family, **keys)
    choice = solved(config, workers)
    found = cuts(choice, 0 if family == "mixtral" else 1)
    experts = {name: axis for name, axis in found.items() if name.startswith("mlp.experts.")}
    assert set(experts.values()) == {"experts"} and len(experts) == 5
    if family == "mixtral":  # without shared experts nothing else wants the stream whole
        for name in ("experts.input", "combine"):  # tokens go there and back, as do gradients
            moved = choice.moved(f"layers.0.mlp.{name}")
            assert [each.kind for each in moved] == ["all_to_all"] * 2


def test_states_that_do_not_fit_are_cut() -> None:
    """Many micro-batches a step make whole weights cheap, and memory decides."""
    config = config_of(num_hidden_layers=16)
    graph = decoder_graph(config, 1, 4096)
    line = line_of(8, accumulation=64)
    roomy, tight = Sharding(graph, line), Sharding(graph, line, budget=8e9)
    free, bound = roomy.solve(), tight.solve()
    assert free is not None and bound is not None
    assert "channels" not in cuts(free).values()
    assert {cuts(bound)[f"mlp.{name}"] for name in ("gate_proj", "down_proj")} == {"channels"}
    assert bound.memory <= 8e9 < free.memory and bound.seconds > free.seconds
    assert Sharding(graph, line, budget=1e9).solve() is None


PLANS: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "two": (config_of(), {"tp": 2}),
    "eight": (config_of(tie_word_embeddings=True), {"tp": 8}),
    "shared key-value heads": (config_of(num_key_value_heads=2), {"tp": 8}),
    "norms behind": (config_of("olmo2", num_key_value_heads=16), {"tp": 4}),
    "norms on both sides": (config_of("gemma2"), {"tp": 2}),
    "experts": (config_of("mixtral", num_local_experts=8), {"tp": 4}),
    "latent attention": (config_of("deepseek_v3"), {"tp": 4}),
    "attention whole": (config_of(), {"tp": 4, "whole": ("attention",)}),
    "attention whole, of whole rows": (
        config_of(), {"tp": 4, "whole": ("attention",), "micro_batch": 4}),
    "networks whole": (config_of(), {"tp": 2, "whole": ("network",)}),
    "blocks whole": (config_of(), {"tp": 2, "whole": ("attention", "network")}),
}  # fmt: skip


def plan_of(**fields: Any) -> Plan:
    plan = replace(Plan.alone("cuda"), precision="bf16", sequence_length=4096, **fields)
    return replace(plan, world_size=plan.tp * plan.dp_shard * plan.pp)


@pytest.mark.parametrize("name", PLANS)
def test_what_the_solution_sends_is_the_plans_traffic(name: str) -> None:
    """Bytes by collective, as the formulas have them that are held against real steps."""
    config, fields = PLANS[name]
    plan = plan_of(**fields)
    choice = planned_sharding(Job(config, 4096, 1), plan, MACHINE).solve()
    assert choice is not None
    found: Counter[str] = Counter()
    for each, operator in choice.sharding.graph.operators.items():
        for moved in choice.moved(each):
            share = 2 if moved.kind == "all_reduce" else 1
            found[moved.kind] += share * operator.times * moved.size * (plan.tp - 1) / plan.tp
    expected = {kind: size for (axis, kind), size in traffic(config, plan).items() if axis == "tp"}
    # An embedding is looked up in fp32 where nothing gathers it, here counted in bf16.
    looked_up = plan.micro_batch * 4096 * config.hidden_size * 2 * (plan.tp - 1) / plan.tp
    expected["reduce_scatter"] -= looked_up
    expected["all_gather"] -= looked_up
    if config.qk_norm == "projection":  # whose sums of squares are no part of the graph
        expected["all_reduce"] -= config.num_layers * 4 * 4 * 2 * 4096 * (plan.tp - 1) / plan.tp
    assert found.keys() == expected.keys()
    for kind, size in expected.items():
        # Norms of queries, keys and latent vectors are no part of it either.
        assert found[kind] == pytest.approx(size, rel=0.01), kind


# Half a block where heads do not divide the workers.
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 768}
UNEVEN = {"6 heads on 4": (4, 6, 2), "9 heads on 2": (2, 9, 3)}


@pytest.mark.parametrize("accumulation", [1, 16])
@pytest.mark.parametrize("name", UNEVEN)
def test_nothing_is_better_where_heads_do_not_divide(name: str, accumulation: int) -> None:
    """Attention's half of a block against every combination of its operators' strategies."""
    workers, heads, keys = UNEVEN[name]
    config = config_of(num_attention_heads=heads, num_key_value_heads=keys, hidden_size=128 * heads)
    graph = decoder_graph(config, 1, 4096)
    names = [n for n in graph.operators if "self_attn" in n or n == "layers.0.stream"]
    half = Graph(
        graph.axes,
        {n: graph.operators[n] for n in names},
        tuple(e for e in graph.edges if e.producer in names and e.consumer in names),
    )
    sharding = Sharding(
        half,
        line_of(workers, accumulation=accumulation),
        # What comes in and goes out is cut by tokens, as it is between all blocks.
        allowed=lambda o, s: s.axis == "sequence" or not o.name.endswith((".stream", ".add")),
    )
    choice = sharding.solve()
    assert choice is not None
    assert "heads" not in {each.axis for each in sharding.options["layers.0.self_attn.attention"]}
    best = cheapest(sharding)
    assert choice.seconds == pytest.approx(best, rel=1e-9)
    # Our workers leave it whole, each with its own queries.
    job, plan = Job(config, 4096, 1), plan_of(tp=workers, accumulation=accumulation)
    assert cut_badly(config, workers) == ("attention",)
    assert "attention" in choose_whole(job, plan, MACHINE)


def cheapest(sharding: Sharding) -> float:
    """The least cost of all combinations, in one array with an axis for each operator."""
    names, program = sharding.names, sharding.program
    sizes = [len(sharding.options[name]) for name in names]
    total = np.zeros(sizes)
    assert total.size > 5_000
    for place, costs in enumerate(program.costs):
        total += costs.reshape([-1 if n == place else 1 for n in range(len(names))])
    for (first, second), costs in program.edges.items():
        assert first < second
        ends = {first: costs.shape[0], second: costs.shape[1]}
        total += costs.reshape([ends.get(place, 1) for place in range(len(names))])
    return float(total.min())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("heads", "heads", None), (WHOLE, "heads", None), ("heads", WHOLE, "all_gather"),
        ("heads", "sequence", "all_to_all"), (PARTIAL, WHOLE, "all_reduce"),
        (PARTIAL, "sequence", "reduce_scatter"), (PARTIAL, PARTIAL, None),
        ("heads", PARTIAL, None), (WHOLE, PARTIAL, None),
    ],
)  # fmt: skip
def test_layouts_turn_into_one_another(before: str, after: str, expected: str | None) -> None:
    assert conversion(before, after) == expected


@pytest.mark.parametrize("accumulation", [1, 4, 64])
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("keys", [{}, {"intermediate_size": 1024}, SIX_HEADS])
def test_what_is_left_whole_is_the_cheapest_that_runs(
    keys: dict[str, Any], micro_batch: int, accumulation: int
) -> None:
    config = config_of(**keys)
    job = Job(config, 4096, 1)
    plan = plan_of(tp=4, micro_batch=micro_batch, accumulation=accumulation)
    seconds = {}
    for whole in [(), ("attention",), ("network",), ("attention", "network")]:
        choice = planned_sharding(job, replace(plan, whole=whole), MACHINE).solve()
        assert (choice is None) == (keys == SIX_HEADS and "attention" not in whole)
        if choice is not None:
            seconds[whole] = choice.seconds
            names = choice.sharding.names
            assert sum(map(choice.seconds_of, names)) == pytest.approx(choice.seconds)
    assert choose_whole(job, plan, MACHINE) == min(seconds, key=lambda whole: seconds[whole])


def test_memory_decides_what_is_left_whole() -> None:
    config = config_of(num_hidden_layers=32, hidden_size=4096, intermediate_size=16384)
    job, plan = Job(config, 4096, 1), plan_of(tp=8, accumulation=8, micro_batch=8, recompute="full")
    assert choose_whole(job, plan, MACHINE) == ("attention",)
    large = replace(DEVICE, memory_bytes=800e9)
    roomy = Cluster("roomy", (replace(MACHINE.pools[0], device=large),))
    assert choose_whole(job, plan, roomy) == ("attention", "network")
    # Of adapters nothing but the weights themselves is held, and no gradient is summed.
    small = replace(DEVICE, memory_bytes=16e9)
    assert choose_whole(job, plan, Cluster("s", (replace(MACHINE.pools[0], device=small),))) == ()


def test_a_plan_says_why_it_is_cut_so() -> None:
    job, plan = Job(config_of(), 4096, 1), plan_of(tp=4)
    first, _ = alternatives(job, plan, MACHINE)
    assert (first.part, first.chosen, first.verdict) == ("attention", "cut", "dearer")
    assert first.other_seconds is not None and first.other_seconds > first.seconds
    uneven = Job(config_of(**SIX_HEADS), 4096, 1)
    first, _ = alternatives(uneven, replace(plan, whole=("attention",)), MACHINE)
    assert (first.other_seconds, first.verdict) == (None, "unavailable")
    lines = sharding_lines(uneven, replace(plan, whole=("attention",)), MACHINE)
    assert "4 does not go into 6 and 2 heads" in "\n".join(lines)
    [products] = [line for line in lines if line.startswith("mlp.down_proj")]
    assert "channels" in products
    sparse = Job(config_of("mixtral", num_local_experts=8), 4096, 8)
    told = sharding_lines(sparse, plan_of(dp_shard=8, zero=3, ep=8), MACHINE)
    assert told[0].startswith("ep 8") and any("exchanges input" in line for line in told)
    assert sharding_lines(job, plan_of(dp_shard=8, zero=3), MACHINE) == []
