"""Logits, gradients and cached generation equal transformers', for every family in odd shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.cases import (
    CASES,
    LENGTH_DEPENDENT,
    by_our_names,
    decoder_like,
    hf_config,
    reference_model,
    tokens,
)
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.models.weights import load_model

TOLERANCE = 2e-5
LENGTH = 23


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Decoder]:
    hf = hf_config(request.param)
    reference = reference_model(hf)
    return request.param, reference, decoder_like(reference, hf)


@torch.no_grad()
def test_logits(pair: tuple[str, Any, Decoder]) -> None:
    _, reference, decoder = pair
    row = tokens(2, LENGTH)
    expected = reference(row).logits
    assert expected.abs().max() > 0.5
    assert (decoder(row) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_cached_steps_equal_the_whole(pair: tuple[str, Any, Decoder]) -> None:
    name, reference, decoder = pair
    row = tokens(2, LENGTH)
    cache = decoder.new_cache(4)  # too small, so that it grows
    steps = [decoder(row[:, :7], cache=cache), decoder(row[:, 7:10], cache=cache)]
    steps += [decoder(row[:, i : i + 1], cache=cache) for i in range(10, LENGTH)]
    ours = torch.cat(steps, 1)
    if name not in LENGTH_DEPENDENT:
        assert (ours - decoder(row)).abs().max() <= TOLERANCE
    past = None
    theirs = []
    for part in row.split([7, 3, *[1] * (LENGTH - 10)], dim=1):
        output = reference(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        theirs.append(output.logits)
    assert (ours - torch.cat(theirs, 1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        *("llama-odd", "qwen3", "gemma2", "phi3", "olmo2", "granite"),
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek", "deepseek-yarn"),
    ],
)
def test_gradients(name: str) -> None:
    hf = hf_config(name)
    reference = reference_model(hf)
    decoder = decoder_like(reference, hf)
    row = tokens(2, LENGTH)
    torch.manual_seed(0)
    upstream = torch.randn(2, LENGTH, reference.config.vocab_size)
    for model in (reference, decoder):
        output = model(row)
        (getattr(output, "logits", output) * upstream).sum().backward()
    theirs = by_our_names({name: p.grad for name, p in reference.named_parameters()})
    for parameter_name, parameter in decoder.named_parameters():
        expected = theirs[parameter_name]
        # A bias of keys shifts all of a query's scores alike: its gradient is next to nothing.
        error = (parameter.grad - expected).norm() / (expected.norm() + 1e-2)
        assert error <= 1e-5, parameter_name


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_saves_is_the_same_model(name: str, tmp_path: Any) -> None:
    """transformers 5 writes other keys than it reads (rope_parameters, layer_types)."""
    hf = hf_config(name)
    reference = reference_model(hf)
    reference.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Decoder)
    assert loaded.config == decoder_config(hf)
    row = tokens(1, LENGTH)
    with torch.no_grad():
        assert (loaded(row) - reference(row).logits).abs().max() <= TOLERANCE


@torch.no_grad()
def test_embeddings_are_scaled_as_transformers_does_in_bf16() -> None:
    """By √hidden rounded to bf16: √48 = 6.9282 becomes 6.9375, and gemma was trained so."""
    hf = hf_config("gemma2")
    reference = reference_model(hf)
    decoder = decoder_like(reference, hf).bfloat16()
    row = tokens(2, LENGTH)
    assert torch.equal(decoder.model.embed(row), reference.bfloat16().model.embed_tokens(row))


@pytest.mark.shared
@torch.no_grad()
def test_a_trained_llama(shared: Any) -> None:
    from transformers import AutoModelForCausalLM

    directory = shared / "weights" / "stories260K_hf"
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    row = torch.randint(3, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert (load_model(directory)(row) - reference(row).logits).abs().max() <= TOLERANCE
