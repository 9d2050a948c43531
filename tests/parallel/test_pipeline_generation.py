"""Generation through a pipeline: every rank gets the tokens that one process would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.pipelines import (
    join,
    make_plan,
    own_parts,
    spread_decoder,
    tiny_decoder,
    token_rows,
)
from tests.rollout.byte_tokenizer import SIZE, byte_tokenizer
from tests.workers import run_on
from trainwright.parallel.pipeline import PipelinedModel
from trainwright.planner.plan import Plan
from trainwright.rollout.engine import generate
from trainwright.rollout.sampling import SamplingParams

PROMPTS = ["ab", "The rain in", "", "x" * 9]
SAMPLING = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5}
BYTES = {"vocab_size": SIZE}


def generated(model: Any) -> list[tuple[int, ...]]:
    completions = generate(model, byte_tokenizer(), PROMPTS, SamplingParams(**SAMPLING))
    return [completion.token_ids for completion in completions]


def run_generation(plan: Plan, **keys: Any) -> list[tuple[int, ...]]:
    mesh, pipeline = join(plan)
    parts = own_parts(plan, mesh, **keys)
    parts[0].train()
    model = PipelinedModel(parts, pipeline)
    assert model.training
    model.eval()
    tokens = generated(model)
    assert not any(part.training for part in parts)
    assert all(parameter.grad is None for parameter in model.parameters())
    return tokens


@pytest.mark.parametrize(
    ("ranks", "schedule", "layers"),
    [
        (2, "1f1b", (5, 3)),
        (2, "interleaved", (2, 2, 3, 1)),
        (2, "zbv", (2, 2, 3, 1)),
        (4, "dualpipev", (1,) * 8),
    ],
)
def test_the_same_tokens_on_every_rank(ranks: int, schedule: str, layers: tuple[int, ...]) -> None:
    keys: dict[str, Any] = {**BYTES, "tie_word_embeddings": True}
    plan = make_plan(ranks, schedule, layers)
    expected = generated(tiny_decoder(**keys).eval())
    assert len(set(expected)) == len(PROMPTS)
    assert run_on(ranks, run_generation, plan, **keys) == [expected] * ranks


def generate_spread(plan: Plan, **keys: Any) -> list[tuple[int, ...]]:
    model = spread_decoder(plan, **keys)
    model.train(False)
    return generated(model.model)


@pytest.mark.parametrize("more", [{"tp": 2}, {"dp_shard": 2, "zero": 3}, {"dp_replicate": 2}])
def test_pipelines_of_cut_models_generate_too(more: dict[str, int]) -> None:
    keys: dict[str, Any] = {**BYTES, "num_key_value_heads": 2}
    plan = make_plan(2, "zbv", (2, 2, 3, 1), **more)
    expected = generated(tiny_decoder(**keys).eval())
    assert run_on(4, generate_spread, plan, **keys) == [expected] * 4


def ask_for_logits(plan: Plan) -> tuple[Any, ...]:
    mesh, pipeline = join(plan)
    model = PipelinedModel(own_parts(plan, mesh), pipeline)
    batch = token_rows(1)[0]
    logits = model(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        segment_ids=batch["segment_ids"],
    )
    picked = model(
        batch["input_ids"], head=lambda hidden, head: head.logits(hidden[:, -1]).argmax(-1)
    )
    assert not logits.requires_grad
    return logits.numpy(), picked.numpy()


def test_whatever_the_head_gives_reaches_all() -> None:
    whole, batch = tiny_decoder(), token_rows(1)[0]
    with torch.no_grad():
        logits = whole(
            batch["input_ids"],
            position_ids=batch["position_ids"],
            segment_ids=batch["segment_ids"],
        )
        picked = whole(batch["input_ids"])[:, -1].argmax(-1)
    for found, token in run_on(2, ask_for_logits, make_plan(2, "1f1b", (4, 4))):
        torch.testing.assert_close(torch.from_numpy(found), logits, rtol=1e-5, atol=1e-5)
        assert token.tolist() == picked.tolist()
