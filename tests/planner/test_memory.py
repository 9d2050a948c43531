"""The closed formulas for memory against what tensors really hold."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainwright.models.decoder import Decoder, Span
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.models.scoring import with_head
from trainwright.optim.optimizers import build_optimizers
from trainwright.planner.memory import (
    activation_bytes,
    head_bytes,
    in_flight,
    layer_bytes,
    state_bytes,
)
from trainwright.planner.parameters import block_weights, stage_weights
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import SCHEDULES, make_schedule
from trainwright.planner.shapes import count_parameters, parameter_count
from trainwright.planner.timeline import most_in_flight
from trainwright.recipe.schema import Optimizer

SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 528,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
ROWS, LENGTH = 2, 96
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 48, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 6,
    },
}  # fmt: skip


def plan_of(**fields: Any) -> Plan:
    """One row of one token a micro-batch on the CPU, unless told otherwise."""
    return replace(Plan.alone(), **fields)


def config_of(family: str, **keys: Any) -> DecoderConfig:
    return decoder_config(new_hf_config(family, {**SHAPE, **keys}, 300))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 32}),
        ("olmo2", {}),
        ("phi3", {}),
        ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    ],
)
def test_activations_are_what_autograd_saves(
    family: str, keys: dict[str, Any], precision: str
) -> None:
    config = config_of(family, **keys)
    model = Decoder(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.randint(0, 300, (ROWS, LENGTH))
    narrow = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), narrow:
        model(ids, head=lambda hidden, head: hidden)
    measured = sum(saved.values())
    if precision == "bf16":  # autocast's copies of the weights, which belong to the states
        measured -= 2 * count_parameters(config).blocks
    plan = plan_of(precision=precision, sequence_length=LENGTH)
    formula = activation_bytes(config, plan) * ROWS
    assert measured == pytest.approx(formula, rel=0.1)


def test_recompute_keeps_less() -> None:
    config = config_of("llama", num_hidden_layers=32)
    none, selective, full = (
        activation_bytes(config, plan_of(precision="bf16", recompute=policy))
        for policy in ("none", "selective", "full")
    )
    assert full < 0.2 * none
    assert full < selective < 0.8 * none
    # Each block's input, and one block whole.
    assert full == pytest.approx(32 * 2 * 192 + none / 32, rel=0.1)
    half = activation_bytes(config, plan_of(precision="bf16", recompute=0.5))
    assert full < half < none


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_states_are_what_an_optimizer_step_leaves(name: str) -> None:
    config = config_of("llama")
    model = Decoder(config)
    optimizers = build_optimizers(
        model.parameters(),
        Optimizer(name=name),
        in_blocks=[p for block in model.blocks for p in block.parameters()],
        muon_dtype=torch.float32,
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            held += sum(v.nbytes for v in state.values() if torch.is_tensor(v) and v.numel() > 1)
    states = state_bytes(config, plan_of(optimizer=name))
    assert states.total == pytest.approx(held, rel=0.01)


def test_states_by_precision_and_optimizer() -> None:
    config = config_of("llama")
    count = parameter_count(config)
    assert state_bytes(config, plan_of()).total == 16 * count
    assert state_bytes(config, plan_of(precision="bf16")).total == 18 * count
    assert state_bytes(config, plan_of(optimizer="adamw-8bit")).total == 10 * count
    assert head_bytes(config, plan_of()) > 4 * 300 * 192


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "olmo2", "phi3", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3"],
)
def test_every_parameter_is_known_with_its_shape(family: str) -> None:
    with torch.device("meta"):
        model = Decoder(config_of(family, **SPARSE.get(family, {})))
    config = model.config
    for layer, block in enumerate(model.blocks):
        built = sorted(tuple(p.shape) for p in block.parameters())
        assert sorted(weight.shape for weight in block_weights(config, layer)) == built
    whole = [w for group in stage_weights(config, plan_of(), 0) for w in group]
    assert sum(w.elements(plan_of()) for w in whole) == sum(p.numel() for p in model.parameters())


def test_a_reward_model_holds_no_logits_and_its_last_stage_no_embedding() -> None:
    hf = new_hf_config("llama", {**SHAPE, "tie_word_embeddings": True}, 300)
    config = decoder_config(with_head(hf, scores=True))
    with torch.device("meta"):
        model = Decoder(config)
        last = Decoder(config, Span(2, 4, embeds=False))
    plan = plan_of(world_size=2, pp=2, stage_layers=(2, 2))
    for part, of, stage in ((model, plan_of(), 0), (last, plan, 1)):
        weights = [w for group in stage_weights(config, of, stage) for w in group]
        assert sorted(w.shape for w in weights) == sorted(tuple(p.shape) for p in part.parameters())
    assert head_bytes(config, plan_of()) == 4 * 192
    assert state_bytes(config, plan_of()).total == 16 * parameter_count(config)


def test_zero_shards_more_with_each_stage() -> None:
    config = config_of("llama")
    count = parameter_count(config)
    plan = plan_of(world_size=4, dp_shard=4, accumulation=2, precision="bf16")
    one, two, three = (state_bytes(config, replace(plan, zero=zero)) for zero in (1, 2, 3))
    for states in (one, two, three):
        assert (states.parameters, states.gradients, states.optimizer) == (
            count, count, 2 * count
        )  # fmt: skip
        assert states.narrow == 0
    assert (one.whole_gradients, two.whole_gradients, three.whole_gradients) == (4 * count, 0, 0)
    counted = count_parameters(config)
    outside = counted.embedding + counted.head + counted.final_norm
    assert one.gathered == two.gathered == 2 * count
    assert three.gathered == 2 * (outside + 2 * counted.block)
    assert one.total > two.total > three.total


def test_tensor_parallelism_leaves_norms_and_few_key_value_heads_whole() -> None:
    config = config_of("llama")  # 6 heads, 2 key-value heads
    plan = plan_of(world_size=6, tp=6)
    hidden, ffn, layers, dim = 192, 528, 4, 32
    block = (2 * hidden * 6 * dim + 3 * hidden * ffn) // 6 + 2 * hidden * 2 * dim + 2 * hidden
    own = layers * block + 2 * 300 * hidden // 6 + hidden
    assert state_bytes(config, plan).parameters == 4 * own


def test_the_fullest_stage_counts_and_tied_copies_do() -> None:
    config = config_of("llama", tie_word_embeddings=True)
    counted = count_parameters(config)
    plan = plan_of(world_size=2, pp=2, stage_layers=(2, 2), accumulation=4)
    first, last = (state_bytes(config, plan, rank).parameters for rank in range(2))
    assert first == 4 * (counted.embedding + 2 * counted.block)
    assert last == first + 4 * counted.final_norm
    assert state_bytes(config, plan).parameters == last


def test_experts_are_dealt_out() -> None:
    config = config_of("qwen3_moe", **SPARSE["qwen3_moe"])
    plan = plan_of(world_size=4, dp_shard=4, zero=3)
    dealt = state_bytes(config, replace(plan, ep=2)).parameters
    assert dealt == state_bytes(config, plan).parameters  # 4 workers hold all of them either way


def test_activations_under_way_in_a_pipeline() -> None:
    config = config_of("llama", num_hidden_layers=8)
    plan = plan_of(world_size=4, pp=4, stage_layers=(2, 2, 2, 2), accumulation=8)
    stage = 2 * layer_bytes(config, plan, 0, "none")
    for rank in range(3):
        assert activation_bytes(config, plan, rank) == (4 - rank) * stage  # 1F1B keeps p - i
    gpipe = replace(plan, schedule="gpipe")
    assert activation_bytes(config, gpipe, 0) == 8 * stage
    assert activation_bytes(config, gpipe) > activation_bytes(config, plan)


def test_rows_cut_by_context_and_streams_by_tensor_parallelism_hold_less() -> None:
    config = config_of("llama")
    plan = plan_of(sequence_length=64)
    alone = activation_bytes(config, plan)
    assert activation_bytes(config, replace(plan, world_size=2, cp=2)) == alone / 2
    both = activation_bytes(config, replace(plan, world_size=2, tp=2))
    assert alone / 2 < both < 0.7 * alone  # gathered inputs of the projections stay whole


def test_offloaded_states_are_the_hosts() -> None:
    config = config_of("llama")
    plan = plan_of(world_size=2, dp_shard=2, zero=3, device="cuda")
    none, optimizer, parameters = (
        state_bytes(config, replace(plan, offload=offload))
        for offload in ("none", "optimizer", "parameters")
    )
    assert none.host == 0
    assert optimizer.total == none.total - none.optimizer
    assert parameters.total == none.gathered


@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batches_in_flight_are_the_schedules_however_many_there_are(name: str) -> None:
    virtual = max(2, SCHEDULES[name].least_virtual) if SCHEDULES[name].most_virtual != 1 else 1
    for ranks, many in itertools.product((2, 3, 4), (8, 17, 50, 51)):
        plan = plan_of(
            world_size=ranks, pp=ranks, virtual_stages=virtual, schedule=name, accumulation=many
        )
        schedule = make_schedule(name, ranks, virtual, many)
        for rank in range(ranks):
            assert len(in_flight(plan, rank)) == most_in_flight(schedule[rank])
