"""What an adapter's states take, against the tensors of a model that has one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainwright.errors import UserError
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import new_model
from trainwright.parallel.precision import COMPUTE_DTYPES
from trainwright.planner import memory
from trainwright.planner.make import make_plan
from trainwright.planner.plan import Machine, Plan
from trainwright.recipe.schema import Adapter, Recipe
from trainwright.training.adapting import adapt, narrow_frozen

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sections", [{}, {"quantise": "nf4"}, {"quantise": "int8"}, {"dora": True}]
)
def test_states_are_those_of_the_tensors(sections: dict, precision: str) -> None:
    config = decoder_config(new_hf_config("llama", SHAPE, 256))
    adapter = Adapter.model_validate({"rank": 8, **sections})
    model = new_model(config, device="meta")
    adapt(model, adapter)
    narrow_frozen(model, COMPUTE_DTYPES[precision])
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    held += sum(12 * p.numel() for p in model.parameters() if p.requires_grad)
    plan = replace(Plan.alone(), precision=precision)
    states = memory.adapted_state_bytes(config, plan, adapter)
    assert states.total - states.narrow == pytest.approx(held, rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_large_model_fits_with_a_quantised_base_only() -> None:
    values = {
        "model": {"family": "llama", "config": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        }},
        "tokenizer": "bytes", "objective": "sft", "data": {"sequence_length": 1024},
        "training": {"steps": 1},
    }  # fmt: skip
    machine = Machine(devices=1, device_kind="cuda", cores=8, memory_bytes=16 * 10**9)
    with pytest.raises(UserError, match="choose a smaller model"):
        make_plan(Recipe.model_validate(values), machine)
    with pytest.raises(UserError, match="quantise: nf4"):
        make_plan(Recipe.model_validate(values | {"adapter": {"rank": 16}}), machine)
    small = values | {"adapter": {"rank": 16, "quantise": "nf4"}}
    assert make_plan(Recipe.model_validate(small), machine).micro_batch >= 1
