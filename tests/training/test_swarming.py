"""The hook between a trainer's steps, beside a peer that says what a test wants it to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from trainwright.models.families import new_hf_config
from trainwright.parallel.world import World
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Optimizer, Recipe
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.peer_desk import Outcome
from trainwright.swarm.settings import resolve_settings
from trainwright.training.loop import Trainer
from trainwright.training.sameness import Trial
from trainwright.training.swarming import Place, SwarmHook, Work, data_seed

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
TOTAL, INNER = 60, 10


class Scripted:
    """A peer that answers `wanted` from a list, and then has nothing to do."""

    def __init__(self, *wanted: str, round: int = 0) -> None:
        self.script, self.round, self.takes = iter(wanted), round, True
        self.offers: list[tuple[int, int]] = []
        self.outcomes: Iterator[Outcome] = iter(())
        self.trial_round = None
        self.left = False
        self.status = SimpleNamespace(cards={}, sent=0, received=0, waited=0.0, round=0)

    def wanted(self, steps: int) -> str:
        return next(self.script, "go on")

    def offer(self, local: torch.Tensor, tokens: int, steps: int, loss: float) -> bool:
        self.offers.append((tokens, steps))
        return self.takes

    @property
    def needed(self) -> bool:
        return False

    def outcome(self, wait: float) -> Outcome:
        found = next(self.outcomes)
        self.round = found.after.round
        return found

    def leave(self) -> None:
        self.left = True


@pytest.fixture
def made():
    recipe = Recipe.model_validate(
        {
            "name": "hooked",
            "model": {"family": "llama", "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": 16},
            "training": {"steps": TOTAL, "batch_sequences": 4},
        }
    )
    plan = replace(Plan.alone(), micro_batch=4, sequence_length=16)
    world = World(0, 1, torch.device("cpu"))
    model = Trial(recipe, new_hf_config("llama", SHAPE, 64), plan, world, rows=4).model
    trainer = SimpleNamespace(
        total_steps=TOTAL, next_index=0, stop_requested=False, unfinished=False
    )
    swarm = Swarm(method="diloco", inner_steps=INNER, codec="fp32")
    settings = resolve_settings(swarm, Optimizer())
    return SwarmHook(
        trainer,  # type: ignore[arg-type]
        model,
        None,  # type: ignore[arg-type]
        lambda layout: build_method(settings, layout),
        held=None,
        data_of=lambda peer: None,  # type: ignore[arg-type,return-value]
        quorum=2,
        writer=None,
        say=lambda text: None,
    )


def step(hook: SwarmHook, done: int, *, last: bool = False, stopping: bool = False) -> int:
    """Tell the hook of a step; the next one's number."""
    hook.trainer.next_index = done
    stats = SimpleNamespace(loss=2.0, targets=100, stop_requested=stopping, skipped=False)
    hook.after_step(done, stats, 1.0, last)  # type: ignore[arg-type]
    return hook.trainer.next_index


def outcome(hook: SwarmHook, round: int, **changes: bool) -> Outcome:
    weights = hook.gathering.weights()
    assert weights is not None
    return Outcome(round, Agreed(round, weights), Agreed(round + 1, weights + 1), **changes)


def test_a_slow_peer_skips_to_the_next_round_but_never_the_last_step(made):
    hook = made
    for round, done, expected in ((0, 4, 10), (5, 53, TOTAL - 1)):
        hook.peer, hook.place = Scripted("contribute", "merge", round=round), Place(round, 3)
        hook.peer.outcomes = iter([outcome(hook, round, included=True)])
        assert step(hook, done) == expected
    assert step(hook, TOTAL, last=True) == TOTAL
    assert hook.peer.left


def test_the_last_step_leaves_what_was_agreed(made):
    hook = made
    hook.peer, hook.place = Scripted("contribute", "merge", round=5), Place(5, 9)
    hook.peer.outcomes = iter([outcome(hook, 5, included=True)])
    agreed = hook.gathering.weights() + 1
    step(hook, TOTAL, last=True)
    assert torch.equal(hook.gathering.weights(), agreed)


def test_at_the_end_a_peer_stays_while_it_is_needed_and_not_asked_to_stop(made, monkeypatch):
    monkeypatch.setattr("trainwright.training.swarming._WAIT_SECONDS", 0.0)

    class Needed(Scripted):
        def __init__(self, *needed: bool) -> None:
            super().__init__()
            self.answers = iter(needed)

        @property
        def needed(self) -> bool:
            assert not self.left
            return next(self.answers)

    hook = made
    hook.place, hook.agreed = Place(TOTAL // INNER), hook.gathering.weights()
    for hook.trainer.stop_requested, answers in ((False, (True, True, False)), (True, (True,))):
        hook.peer = Needed(*answers)
        step(hook, TOTAL, last=True)
        assert hook.peer.left and next(hook.peer.answers, None) is None
    # One that is stopped before the end stays for a while all the same, and no longer.
    monkeypatch.setattr("trainwright.training.swarming._WAIT_SECONDS", 1 / 64)
    monkeypatch.setattr("trainwright.training.swarming._FAREWELL", 5 / 64)
    for answers, left_over in (((True, True, False), 0), ((True,) * 20, 14)):
        hook.place, hook.peer = Place(1, 2), Needed(*answers)
        step(hook, 2 * INNER, last=True, stopping=True)
        assert hook.peer.left and len(list(hook.peer.answers)) == left_over


def test_an_interruption_while_the_last_round_is_awaited_is_no_end(made):
    hook = made
    hook.peer, hook.place = Scripted("contribute", round=5), Place(5, 9)
    hook.trainer.stop_requested = True
    before = hook.gathering.weights()
    hook.agreed = before + 5
    step(hook, TOTAL, last=True)
    assert hook.trainer.unfinished
    assert torch.equal(hook.gathering.weights(), before)


def test_what_was_replaced_leaves_no_steps_behind(made):
    """Else a contribution would come of no work at all."""
    hook = made
    hook.peer, hook.place = Scripted("merge"), Place(0, 9, Work(9, 900, 18.0))
    hook.peer.outcomes = iter([outcome(hook, 3, replaced=True)])
    assert step(hook, 10) == 40
    assert hook.place == Place(4)


@pytest.mark.parametrize("takes", [True, False])
def test_an_offer_that_comes_too_late_keeps_its_work(made, takes):
    hook = made
    hook.peer, hook.place = Scripted("contribute"), Place(0, 9, Work(12, 1200, 24.0))
    hook.peer.takes = takes
    step(hook, 10)
    assert hook.peer.offers == [(1300, 13)]
    assert hook.place == (Place() if takes else Place(0, 10, Work(13, 1300, 26.0)))


@pytest.mark.parametrize("included", [True, False])
def test_work_that_no_round_took_in_counts_in_the_next(made, included):
    hook = made
    hook.peer, hook.place = Scripted("contribute", "merge"), Place(0, 9, Work(9, 900, 18.0))
    local = hook.gathering.weights()
    hook.peer.outcomes = iter([outcome(hook, 0, included=included)])
    step(hook, 10)
    assert hook.place.round == 1
    assert hook.place.work == (Work() if included else Work(10, 1000, 20.0))
    # Left out, a peer carries its own change on from what was agreed: here there was none.
    assert torch.equal(hook.gathering.weights(), local + 1)


def test_every_peer_has_an_order_of_its_own_that_all_can_tell():
    seeds = {data_seed(42, peer) for peer in ("a" * 20, "b" * 20, None)}
    assert len(seeds) == 3
    assert data_seed(42, None) in seeds and data_seed(43, None) not in seeds


def test_asked_to_stop_while_it_waits_a_peer_trains_no_further_step(made):
    """What was wanted then is done first when the run goes on: as if nothing had been."""
    hook = made

    class Asked(Scripted):
        def outcome(self, wait: float) -> Outcome | None:  # type: ignore[override]
            hook.trainer.stop_requested = True
            return None

    hook.peer, hook.place = Asked("contribute", *["merge"] * 9), Place(0, INNER - 1)
    step(hook, INNER)
    assert hook.trainer.unfinished and hook.peer.left
    place, sent, offered = hook.place, hook.sent, hook.offered
    assert place == Place(0, 0) and sent is not None and offered is not None

    hook.trainer.stop_requested = False
    hook.peer = Scripted("merge", round=0)
    hook.peer.start = lambda wait: outcome(hook, 0).before
    hook.peer.offered = True
    hook.peer.outcomes = iter([outcome(hook, 0, included=True)])
    agreed = hook.gathering.weights() + 1
    assert hook.begin(place, sent, offered, INNER) == INNER
    assert hook.place == Place(1, 0) and hook.offered is None
    assert torch.equal(hook.gathering.weights(), agreed)


@pytest.mark.parametrize(("at", "returns"), [(3, 3), (5, 4)])
def test_a_hook_that_was_interrupted_ends_the_loop_and_later_hooks_know(made, at, returns):
    told = []

    class Interrupted:
        def after_step(self, done: int, stats: object, seconds: float, last: bool) -> None:
            trainer.unfinished = done == at

    class Later:
        def after_step(self, done: int, stats: object, seconds: float, last: bool) -> None:
            told.append((done, last))

    recipe = Recipe.model_validate(
        {
            "name": "interrupted",
            "model": {"family": "llama", "config": SHAPE},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": 16},
            "training": {"steps": 5, "batch_sequences": 4},
        }
    )
    stats = SimpleNamespace(stop_requested=False)
    trainer = Trainer(
        recipe,
        SimpleNamespace(batch=lambda index, rows: None),  # type: ignore[arg-type]
        slice(0, 4),
        lambda *given, **more: stats,  # type: ignore[arg-type]
        total_steps=5,
        hooks=[Interrupted(), Later()],
    )
    assert trainer.run() == returns
    assert told == [(done, done == at) for done in range(1, at + 1)]
