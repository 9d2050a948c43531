"""A block can be compiled, recomputed and narrowed without changing what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models.cases import CASES, hf_config, randomise, tokens
from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config
from trainwright.models.output_head import OutputHead

SEGMENTS = torch.tensor([[0] * 5 + [1] * 6 + [-1]] * 2)


def decoder_of(name: str) -> Decoder:
    decoder = Decoder(decoder_config(hf_config(name)))
    randomise(decoder)
    return decoder


def results(decoder: Decoder, segments: Tensor | None) -> list[Tensor]:
    decoder.zero_grad(set_to_none=True)
    logits = decoder(tokens(2, 12), segment_ids=segments)
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in decoder.parameters())]


@pytest.mark.parametrize("name", ["llama-biases", "gemma3", "phi3", "olmo2", "smollm3", "granite"])
def test_blocks_compile_without_graph_breaks(name: str) -> None:
    decoder = decoder_of(name)
    plain = [results(decoder, segments) for segments in (None, SEGMENTS)]
    torch.compiler.reset()
    for block in decoder.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = [results(decoder, segments) for segments in (None, SEGMENTS)]
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(name: str) -> None:
    decoder = decoder_of(name)
    plain = results(decoder, SEGMENTS)
    calls = 0

    def recomputing(block: nn.Module) -> None:
        forward = block.forward

        def counted(*args: object) -> Tensor:
            nonlocal calls
            calls += 1
            return forward(*args)

        block.forward = lambda *args: checkpoint(counted, *args, use_reentrant=False)  # type: ignore[method-assign]

    for block in decoder.blocks:
        recomputing(block)
    for one, other in zip(plain, results(decoder, SEGMENTS), strict=True):
        assert torch.equal(one, other)
    assert calls == 2 * len(decoder.blocks)


@pytest.mark.parametrize("name", CASES)
def test_the_stream_is_bf16_under_autocast(name: str) -> None:
    decoder = decoder_of(name)
    seen: list[torch.dtype] = []
    for module in [*decoder.blocks, decoder.model.norm]:
        module.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(tokens(2, 12), segment_ids=SEGMENTS)
    assert set(seen) == {torch.bfloat16}
    assert logits.dtype == torch.float32
    exact = decoder(tokens(2, 12), segment_ids=SEGMENTS)
    error = (logits - exact)[:, :-1].square().mean().sqrt() / exact[:, :-1].square().mean().sqrt()
    # Rounding changes an expert that is chosen here and there.
    assert error < (0.05 if decoder.config.experts is None else 0.15)
    logits.mean().backward()
    assert {p.grad.dtype for p in decoder.parameters()} == {torch.float32}


def test_head_functions_see_hidden_states_and_the_head() -> None:
    for name in ("gemma2", "granite", "llama"):
        decoder = decoder_of(name)

        def last(hidden: Tensor, head: OutputHead) -> Tensor:
            assert hidden.shape == (2, 12, 48)
            return head.logits(hidden[:, -1:])

        row = tokens(2, 12)
        assert torch.allclose(decoder(row, head=last), decoder(row)[:, -1:], atol=1e-6)


def test_tied_models_have_one_matrix() -> None:
    decoder = decoder_of("llama-odd")
    names = [name for name, _ in decoder.named_parameters()]
    assert "lm_head.weight" not in names
    assert "lm_head.weight" not in decoder.state_dict()
    decoder(tokens(1, 4)).sum().backward()
    used = set(tokens(1, 4).flatten().tolist())
    unused = [i for i in range(decoder.vocab_size) if i not in used]
    # Rows that no token looked up still learn as the head.
    assert (decoder.model.embed_tokens.weight.grad[unused].abs().sum(-1) > 0).all()


def test_a_generation_passes_segments_always_or_never() -> None:
    decoder = decoder_of("llama")
    cache = decoder.new_cache()
    decoder(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="every pass"):
        decoder(tokens(1, 1), segment_ids=torch.zeros(1, 1), cache=cache)


def test_windowed_layers_hold_little_more_than_their_window() -> None:
    decoder = decoder_of("mistral")
    cache = decoder.new_cache(500)
    with torch.no_grad():
        for token in tokens(1, 60)[0]:
            decoder(token.view(1, 1), cache=cache)
    assert cache.length == 60
    assert all(layer._keys.shape[2] <= 2 * 5 for layer in cache.layers)
