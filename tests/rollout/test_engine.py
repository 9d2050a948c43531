"""Generation equals transformers', alone or batched, whole or streamed, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.models.cases import CASES, SHAPE, decoder_like, randomise, reference_model
from tests.rollout.byte_tokenizer import SIZE, byte_tokenizer
from tests.workers import run_on
from trainwright.errors import UserError
from trainwright.models.decoder import Decoder
from trainwright.models.fallback import FallbackModel
from trainwright.models.families import new_hf_config
from trainwright.rollout.engine import Completion, generate, stream
from trainwright.rollout.sampling import SamplingParams

GREEDY = SamplingParams(max_new_tokens=20, temperature=0)
PROMPTS = ["Hello, world", "a", "Once upon a time", "naïve", "the quick brown fox"]
# transformers' cached generation and its own whole pass differ for dynamic NTK; ours is tested
# against its cached one in tests/models/test_parity.py, row by row.
NAMES = [name for name in CASES if name != "llama-dynamic"]


def pair(name: str) -> tuple[Any, Decoder]:
    """transformers' model and ours, over bytes."""
    family, keys = CASES[name]
    hf = new_hf_config(family, {**SHAPE, **keys}, SIZE)
    theirs = reference_model(hf)
    ours = decoder_like(theirs, hf)
    return theirs, ours


def transformers_greedy(model: Any, tokens: list[int], eos: int | None) -> list[int]:
    output = model.generate(
        torch.tensor([tokens]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return output[0, len(tokens) :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers_and_batches_equal_single_prompts(name: str) -> None:
    """Lengths cross the windows, and LongRoPE's switch at 12 tokens, at different steps."""
    theirs, ours = pair(name)
    tokenizer = byte_tokenizer()
    together = generate(ours, tokenizer, PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        expected = transformers_greedy(theirs, tokenizer(prompt)["input_ids"], 1)
        assert list(completion.token_ids) == expected
        assert generate(ours, tokenizer, [prompt], GREEDY) == [completion]


def test_sampling_is_the_same_in_any_batch_and_differs_by_seed() -> None:
    _, ours = pair("llama-odd")
    tokenizer = byte_tokenizer()

    def sample(rows: int, seed: int) -> list[Completion]:
        params = SamplingParams(max_new_tokens=15, top_p=0.9, seed=seed)
        return generate(ours, tokenizer, PROMPTS, params, batch_rows=rows)

    assert sample(1, 0) == sample(2, 0) == sample(32, 0)
    assert sample(32, 0) != sample(32, 1)
    twice = generate(ours, tokenizer, ["a", "a"], SamplingParams(max_new_tokens=15))
    assert twice[0] != twice[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_text(temperature: float) -> None:
    _, ours = pair("qwen3")
    tokenizer = byte_tokenizer()
    params = SamplingParams(max_new_tokens=40, temperature=temperature, stop=("e", "zz"))
    for prompt in PROMPTS:
        (completion,) = generate(ours, tokenizer, [prompt], params)
        assert "".join(stream(ours, tokenizer, prompt, params)) == completion.text
        assert "e" not in completion.text


class Parrot(torch.nn.Module):
    """Says a fixed text, one token a step, whatever it is told."""

    pads_left = True
    max_positions = None
    stop_token_ids: tuple[int, ...] = ()
    refill_lengths: frozenset[int] = frozenset()

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokens, self.place = tokens, 0

    def new_cache(self, capacity: int) -> None:
        self.place = 0
        return self

    def forward(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        said = torch.tensor([self.tokens[self.place]] * len(input_ids))
        self.place += 1
        return torch.nn.functional.one_hot(said, SIZE).float()


def said(text: str, *, stop: tuple[str, ...] = (), room: int = 99, end: bool = True) -> Completion:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"] + ([1] if end else [2] * 99)
    params = SamplingParams(max_new_tokens=room, temperature=0, stop=stop)
    parrot: Any = Parrot(tokens)
    pieces = list(stream(parrot, tokenizer, "x", params))
    (completion,) = generate(parrot, tokenizer, ["x"], params)
    assert "".join(pieces) == completion.text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces) or room < 99
    return completion


def test_texts_end_at_eos_which_counts_but_is_not_shown() -> None:
    completion = said("日本 🙂!")
    assert completion.text == "日本 🙂!"
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == 1


def test_texts_end_before_a_stop_string_that_spans_tokens() -> None:
    completion = said("Yes.\nUser: more", stop=("\nUser:", "mor"))
    assert (completion.text, completion.finish_reason) == ("Yes.", "stop")
    assert len(completion.token_ids) == len("Yes.\nUser:")


def test_texts_end_where_the_room_does() -> None:
    assert said("abcdef", room=4) == said("abcdef", room=4, end=False)
    completion = said("ab\nU", stop=("\nUser",), room=4)
    assert (completion.text, completion.finish_reason) == ("ab\nU", "length")
    assert said("ab", room=3).finish_reason == "stop"


def test_several_stop_tokens() -> None:
    _, ours = pair("llama")
    tokenizer = byte_tokenizer()
    (free,) = generate(ours, tokenizer, ["Hello"], GREEDY)
    third = free.token_ids[2]
    first = free.token_ids.index(third)
    ours.stop_token_ids = (250, third)
    (stopped,) = generate(ours, tokenizer, ["Hello"], GREEDY)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"


def test_prompts_may_be_token_ids_or_empty() -> None:
    _, ours = pair("llama")
    tokenizer = byte_tokenizer()
    ids = tokenizer("Hello")["input_ids"]
    assert generate(ours, tokenizer, [ids], GREEDY) == generate(ours, tokenizer, ["Hello"], GREEDY)
    assert generate(ours, tokenizer, [""], GREEDY) == generate(ours, tokenizer, [[0]], GREEDY)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="empty"):
        generate(ours, tokenizer, [""], GREEDY)


def test_generation_leaves_the_model_as_it_was() -> None:
    _, ours = pair("llama")
    ours.train()
    pieces = stream(ours, byte_tokenizer(), "Hello", GREEDY)
    next(pieces)
    assert torch.is_grad_enabled()
    assert ours.training
    ours(torch.zeros(1, 3, dtype=torch.long)).sum().backward()


def test_compiled_blocks_are_not_compiled_for_every_length() -> None:
    _, ours = pair("llama")
    expected = generate(ours, byte_tokenizer(), ["Hello"], GREEDY)

    def refuse(*args: object) -> None:
        raise AssertionError("generation compiled a block")

    for block in ours.blocks:
        block.compile(backend=refuse)
    assert generate(ours, byte_tokenizer(), ["Hello"], GREEDY) == expected


def generate_sharded() -> list[tuple[int, ...]]:
    """On a worker: completions of a model whose weights are spread."""
    _, model = pair("qwen2")
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    completions = generate(model, byte_tokenizer(), PROMPTS, GREEDY)
    return [completion.token_ids for completion in completions]


def test_sharded_models_generate_the_same() -> None:
    _, whole = pair("qwen2")
    expected = [
        completion.token_ids for completion in generate(whole, byte_tokenizer(), PROMPTS, GREEDY)
    ]
    assert run_on(2, generate_sharded) == [expected, expected]


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40}),
        ("mamba", {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_fallback_models_generate_as_transformers_does(model_type: str, keys: dict) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=SIZE, **keys, bos_token_id=0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    randomise(theirs)
    theirs.tie_weights()
    ours, tokenizer = FallbackModel(theirs), byte_tokenizer()
    for prompt, completion in zip(PROMPTS, generate(ours, tokenizer, PROMPTS, GREEDY), strict=True):
        expected = transformers_greedy(theirs, tokenizer(prompt)["input_ids"], 1)
        assert list(completion.token_ids) == expected


def test_learnt_positions_end_a_text() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=SIZE, n_positions=12, n_embd=8, n_layer=1, n_head=1)
    inner = GPT2LMHeadModel(config)
    ours, tokenizer = FallbackModel(inner), byte_tokenizer()
    (completion,) = generate(ours, tokenizer, ["Hello"], GREEDY)
    assert len(completion.token_ids) <= 7
    with pytest.raises(UserError, match="context"):
        generate(ours, tokenizer, ["Hello, world!"], GREEDY)


@pytest.mark.shared
def test_a_trained_llama_tells_its_story(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainwright.models.weights import load_model

    directory = shared / "weights" / "stories260K_hf"
    model, tokenizer = load_model(directory), AutoTokenizer.from_pretrained(directory)
    prompt = "Once upon a time, there was a little girl named Lily."
    told = " She loved to play outside in the park. One day, she saw a big, red ball."
    params = SamplingParams(max_new_tokens=100, temperature=0)
    completions = generate(model, tokenizer, [prompt, "Tim had a dog. The dog"], params)
    assert completions[0].text.startswith(told)
    assert "".join(stream(model, tokenizer, prompt, params)) == completions[0].text

    theirs = AutoModelForCausalLM.from_pretrained(directory)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = theirs.generate(tokens, max_new_tokens=100, do_sample=False)[0, tokens.shape[1] :]
    assert list(completions[0].token_ids) == output.tolist()
    until = SamplingParams(max_new_tokens=100, temperature=0, stop=("red ball",))
    (stopped,) = generate(model, tokenizer, [prompt], until)
    assert stopped.text == told.removesuffix("red ball.")
