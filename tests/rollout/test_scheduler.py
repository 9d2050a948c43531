"""Rows that join a batch on its way get what they get alone, and leave it without a trace."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.adapter_cases import adapted
from tests.rollout.byte_tokenizer import SIZE, byte_tokenizer
from tests.rollout.test_engine import GREEDY, PROMPTS, pair, transformers_greedy
from trainwright.models.adapter_files import load_adapter, save_adapter
from trainwright.models.decoder import Decoder
from trainwright.models.fallback import FallbackModel
from trainwright.rollout.engine import Generation, Row, generate
from trainwright.rollout.sampling import SamplingParams
from trainwright.rollout.scheduler import ClosedError, Scheduler, Ticket


class Asked:
    """A row given to a scheduler, and what came of it."""

    def __init__(
        self,
        model: Any,
        prompt: str,
        params: SamplingParams = GREEDY,
        adapters: tuple[str, ...] = (),
        number: int = 0,
    ) -> None:
        self.row = Row(model, byte_tokenizer(), prompt, params, number)
        self.ticket = Ticket(self.row, adapters, self._hear)
        self.text, self.error = "", None
        self.begun, self.ended = threading.Event(), threading.Event()

    def _hear(self, news: Any) -> None:
        if isinstance(news, Exception):
            self.error = news
        else:
            self.text += news.text
        self.begun.set()
        if self.error is not None or news.reason is not None:
            self.ended.set()

    def tokens(self) -> list[int]:
        """All of them, once they are there."""
        assert self.ended.wait(60)
        assert self.error is None, self.error
        assert self.text == self.row.completion().text
        return self.row.tokens


@pytest.fixture
def scheduler():
    """Makes schedulers that end with the test."""
    made: list[Scheduler] = []

    def make(model: Any, **options: Any) -> Scheduler:
        made.append(Scheduler(model, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.join()


# Windows, turns that change with the length, latents, experts.
CACHES = ["llama", "mistral", "gemma3", "phi3-short", "phi3-long", "smollm3", "deepseek", "mixtral"]


@pytest.mark.parametrize("name", CACHES)
def test_rows_that_join_and_leave_equal_transformers(name: str) -> None:
    """A row a step: shorter and longer ones join, windows and LongRoPE's switch are crossed."""
    theirs, ours = pair(name)
    tokenizer = byte_tokenizer()
    rows = [Row(ours, tokenizer, prompt, GREEDY, 0) for prompt in PROMPTS]
    waiting, running = list(rows), Generation(ours, [rows[0]])
    waiting.pop(0)
    running.step()
    for _ in range(40):
        if waiting:
            newcomer = Generation(ours, [waiting.pop(0)])
            newcomer.step()
            running.keep(range(len(running.rows)), [newcomer])
        running.step()
        stay = [i for i, row in enumerate(running.rows) if row.reason is None]
        if not stay:
            break
        running.keep(stay)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.tokens == transformers_greedy(theirs, tokenizer(prompt)["input_ids"], 1)


def test_each_row_is_sampled_in_its_own_way(scheduler: Any) -> None:
    _, ours = pair("gemma2")
    ways = [
        SamplingParams(12 + seed, temperature=seed % 3 / 2, top_k=4 * seed, seed=seed)
        for seed in range(len(PROMPTS))
    ]
    together = scheduler(ours)
    asked = [Asked(ours, prompt, way) for prompt, way in zip(PROMPTS, ways, strict=True)]
    for each in asked:
        together.submit(each.ticket)
    for prompt, way, each in zip(PROMPTS, ways, asked, strict=True):
        (alone,) = generate(ours, byte_tokenizer(), [prompt], way)
        assert each.tokens() == list(alone.token_ids)


def learnt(folder: Path, seed: int, **spec: Any) -> Path:
    """A random adapter of the model `llama`, saved as PEFT has it."""
    from tests.models.adapter_cases import move

    _, model = pair("llama")
    adapted(model, learnt=False, **spec)
    move(model, seed)
    save_adapter(model, folder)
    return folder


def test_adapters_take_turns_and_stack(scheduler: Any, tmp_path: Path) -> None:
    one = learnt(tmp_path / "1", 1)
    two = learnt(tmp_path / "2", 2, targets=("q_proj", "v_proj"), dora=True)
    _, ours = pair("llama")
    load_adapter(ours, one, name="one")
    load_adapter(ours, two, name="two")
    sets = [(), ("one",), ("two",), ("one", "two")]
    together = scheduler(ours)
    asked = [Asked(ours, prompt, adapters=names) for prompt in PROMPTS[:3] for names in sets]
    for each in asked:
        together.submit(each.ticket)
    found: dict[tuple[str, ...], list[tuple[int, ...]]] = {names: [] for names in sets}
    for each in asked:
        _, alone = pair("llama")
        for name in each.ticket.adapters:
            load_adapter(alone, {"one": one, "two": two}[name], name=name)
        prompt = each.row.prompt
        (expected,) = generate(alone, byte_tokenizer(), [prompt], GREEDY)
        assert each.tokens() == list(expected.token_ids)
        found[each.ticket.adapters].append(expected.token_ids)
    assert len({tuple(tokens) for tokens in found.values()}) == len(sets)


def test_models_that_cannot_be_padded_go_row_by_row(scheduler: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=SIZE, n_positions=40, n_embd=16, n_layer=2, n_head=2)
    inner = GPT2LMHeadModel(config).eval()
    model = FallbackModel(inner)
    together = scheduler(model)
    asked = [Asked(model, prompt) for prompt in PROMPTS]
    for each in asked:
        together.submit(each.ticket)
    for prompt, each in zip(PROMPTS, asked, strict=True):
        assert each.tokens() == transformers_greedy(inner, byte_tokenizer()(prompt)["input_ids"], 1)


ENDLESS = SamplingParams(max_new_tokens=1_000_000, temperature=0)


def endless(model: Decoder) -> Decoder:
    """The model, which never ends a text by itself."""
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0  # the tokenizer's EOS: other logits are above zero
    return model


def test_a_cancelled_row_makes_room(scheduler: Any) -> None:
    _, ours = pair("llama")
    narrow = scheduler(endless(ours), most_rows=1)
    first, second = Asked(ours, "a", ENDLESS), Asked(ours, "Hello")
    narrow.submit(first.ticket)
    narrow.submit(second.ticket)
    assert first.begun.wait(60)
    assert not second.begun.is_set()
    first.ticket.cancelled = True
    assert len(second.tokens()) == 20
    assert not first.ended.is_set()


def test_a_failure_is_told_to_whom_it_concerns(scheduler: Any, monkeypatch: Any) -> None:
    _, ours = pair("llama")
    together = scheduler(endless(ours), most_rows=2)  # what fails must not keep its place
    going, broken = Asked(ours, "a", ENDLESS), Asked(ours, "b")
    unknown = Asked(ours, "b", adapters=("nobody",))
    together.submit(going.ticket)
    assert going.begun.wait(60)
    broken.row.prompt = [SIZE + 1]  # no row of the embedding
    for each in (broken, unknown):
        together.submit(each.ticket)
        assert each.ended.wait(60)
    assert isinstance(broken.error, IndexError)
    assert "nobody" in str(unknown.error)
    last = Asked(ours, "Hello")
    together.submit(last.ticket)
    assert len(last.tokens()) == 20
    assert going.error is None
    together.close()
    assert going.ended.wait(60)
    assert isinstance(going.error, ClosedError)
