"""Models without a family of their own: transformers' class, called like a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.cases import randomise, tokens
from trainwright.errors import UserError
from trainwright.models.fallback import FallbackModel
from trainwright.models.output_head import OutputHead
from trainwright.models.weights import load_model

SMALL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "gpt_neox": {**SIZES, "max_position_embeddings": 64},
    "cohere": {**SIZES, "logit_scale": 0.25},
    "granitemoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": {**SIZES, "sliding_window": 5},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
}
PACKS = ("gpt2", "gpt_neox", "cohere", "granitemoe", "olmo3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, FallbackModel]]:
    """transformers' model and ours of the saved same, by model_type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    pairs = {}
    for name, keys in MODELS.items():
        config = AutoConfig.for_model(name, **SMALL, **keys)
        theirs = AutoModelForCausalLM.from_config(config).eval()
        randomise(theirs)
        theirs.tie_weights()
        directory = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(directory)
        ours = load_model(directory)
        assert isinstance(ours, FallbackModel)
        pairs[name] = (theirs, ours)
    return pairs


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_names_are_those_of_transformers(models: Any, name: str) -> None:
    theirs, ours = models[name]
    row = tokens(2, 14)
    assert torch.allclose(ours(row), theirs(row).logits, atol=1e-5)
    expected = {parameter_name for parameter_name, _ in theirs.named_parameters()}
    assert {parameter_name for parameter_name, _ in ours.named_parameters()} == expected
    assert len(ours.blocks) == theirs.config.num_hidden_layers
    assert ours.stop_token_ids == (2,)


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_lent_where_they_are_linear(models: Any, name: str) -> None:
    theirs, ours = models[name]
    row = tokens(2, 14)

    def head(hidden: Tensor, output: OutputHead) -> Tensor:
        return output.logits(hidden)

    assert torch.allclose(ours(row, head=head), theirs(row).logits, atol=1e-5)


def test_an_odd_head_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", **SMALL, **MODELS["gpt2"])
    odd = AutoModelForCausalLM.from_config(config)
    forward = odd.forward

    def bent(input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        output = forward(input_ids, position_ids=position_ids, use_cache=use_cache)
        output.logits = output.logits.tanh()
        return output

    odd.forward = bent
    with pytest.raises(UserError, match="cannot be fused"):
        FallbackModel(odd)(tokens(1, 5), head=lambda hidden, output: hidden)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_stay_apart_or_are_refused(models: Any, name: str) -> None:
    _, ours = models[name]
    row = tokens(1, 21)
    segments = torch.tensor([[0] * 9 + [1] * 12])
    if name not in PACKS:
        with pytest.raises(UserError, match="packing: none"):
            ours(row, segment_ids=segments)
        return
    alone = torch.cat([ours(document) for document in row.split([9, 12], dim=1)], dim=1)
    assert torch.allclose(ours(row, segment_ids=segments), alone, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_padding_after_a_document_needs_no_packing(models: Any, name: str) -> None:
    _, ours = models[name]
    row = tokens(2, 12)
    segments = torch.zeros_like(row)
    segments[1, 7:] = -1
    logits = ours(row, segment_ids=segments)
    assert torch.allclose(logits[:1], ours(row[:1]), atol=1e-5)
    assert torch.allclose(logits[1:, :7], ours(row[1:, :7]), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_equal_the_whole(models: Any, name: str) -> None:
    _, ours = models[name]
    row = tokens(2, 14)
    cache = ours.new_cache()
    with torch.no_grad():
        steps = [ours(part, cache=cache) for part in row.split([8, *[1] * 6], dim=1)]
        assert torch.allclose(torch.cat(steps, 1), ours(row)[:, 7:], atol=1e-4)


def test_training_has_no_dropout(models: Any) -> None:
    _, ours = models["gpt2"]
    row = tokens(2, 12)
    ours.train()
    assert ours.training
    assert torch.equal(ours(row), ours(row))


def test_a_model_that_transformers_does_not_know_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="transformers cannot load"):
        load_model(tmp_path)
