"""The closed formulas for memory against what tensors really hold."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from trainwright.models.decoder import Decoder
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.optim.optimizers import build_optimizers
from trainwright.planner.memory import activation_bytes, head_bytes, state_bytes
from trainwright.planner.shapes import count_parameters, parameter_count
from trainwright.recipe.schema import Optimizer

SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 528,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
ROWS, LENGTH = 2, 96


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
    formula = activation_bytes(config, precision, "none") * ROWS * LENGTH
    assert measured == pytest.approx(formula, rel=0.1)


def test_recompute_keeps_less() -> None:
    config = config_of("llama", num_hidden_layers=32)
    none, selective, full = (
        activation_bytes(config, "bf16", policy)  # type: ignore[arg-type]
        for policy in ("none", "selective", "full")
    )
    assert full < 0.2 * none
    assert full < selective < 0.8 * none
    # Each block's input, and one block whole.
    assert full == pytest.approx(32 * 2 * 192 + none / 32, rel=0.1)


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
    assert state_bytes(config, name, "fp32") == pytest.approx(held, rel=0.01)


def test_states_by_precision_and_shards() -> None:
    config = config_of("llama")
    count = parameter_count(config)
    counted = count_parameters(config)
    assert state_bytes(config, "adamw", "fp32") == 16 * count
    assert state_bytes(config, "adamw", "bf16") == 18 * count
    gathered = 2 * max(3 * counted.block, counted.embedding + counted.head)
    assert state_bytes(config, "adamw", "bf16", dp_shard=4) == 4 * count + gathered
    assert state_bytes(config, "adamw-8bit", "fp32") == 10 * count
    assert head_bytes(config) > 4 * 300 * 192
