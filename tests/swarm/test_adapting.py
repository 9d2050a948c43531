"""What `auto` chooses, against a simulation of rounds and every other choice."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from trainwright.errors import UserError
from trainwright.recipe.schema import Optimizer
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.adapting import (
    CODECS,
    DENSITIES,
    MESSAGE_BYTES,
    MOST_STEPS,
    SHARE,
    Adapted,
    adapt,
    contribution_bytes,
    exchange_seconds,
)
from trainwright.swarm.layout import Layout
from trainwright.swarm.link import Link
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.settings import DEFAULTS, Settings, resolve_settings

LAYOUT = Layout(
    (("embedding.weight", (128, 256)), *((f"layers.{n}.weight", (64, 256)) for n in range(6)))
)
HOME = Link(up=1.25e5, down=1.25e5, call=0.08)  # 1 Mbit/s, for a small model
OPTIMIZER = Optimizer()
SIZE = cache(contribution_bytes)


def auto(swarm: Swarm, step: float, link: Link | None = HOME) -> Adapted:
    """What is chosen for four peers."""
    return adapt(swarm, OPTIMIZER, LAYOUT, link=link, step_seconds=step, peers=4, measure=SIZE)


def share_by_simulation(settings: Settings, exchange: float, step: float) -> float:
    """Of 50 rounds of a peer that steps, sends, goes on for `delay` steps and then waits."""
    steps = settings.inner_steps // settings.fragments
    now = computed = 0.0
    arrives = None  # when the exchange under way is over
    for index in range(50 * steps):
        now += step
        computed += step
        if arrives is not None and index % steps == settings.delay - 1:
            now = max(now, arrives)
            arrives = None
        if index % steps == steps - 1:
            arrives = now + exchange
            if settings.delay == 0:
                now, arrives = arrives, None
    return computed / now


def chosen_share(settings: Settings, link: Link, step: float, peers: int, size: int) -> float:
    exchange = exchange_seconds(settings.method, size, link, peers)
    return share_by_simulation(settings, exchange, step)


@pytest.mark.parametrize("method", ["diloco", "streaming", "sparseloco", "noloco"])
@pytest.mark.parametrize("step", [0.02, 0.8, 2.0])
@pytest.mark.parametrize("link", [HOME, Link(1e8, 1e8, 0.001), Link(1e5, 1e6, 0.2)])
def test_the_least_steps_that_hide_the_exchange(method: str, step: float, link: Link) -> None:
    swarm = Swarm.model_validate({"method": method})
    found = auto(swarm, step, link).settings
    size = SIZE(found, LAYOUT)
    own = DEFAULTS[method].inner_steps
    parts = found.fragments
    if found.inner_steps < MOST_STEPS // parts * parts:
        assert chosen_share(found, link, step, 4, size) >= SHARE - 0.01
    if found.inner_steps > own:
        less = replace(found, inner_steps=found.inner_steps - parts)
        assert chosen_share(less, link, step, 4, size) < SHARE + 0.01
    assert own <= found.inner_steps <= MOST_STEPS
    assert replace(found, inner_steps=own) == resolve_settings(swarm, OPTIMIZER)


def test_the_finest_codec_that_hides() -> None:
    swarm = Swarm.model_validate({"method": "diloco", "codec": "auto", "inner_steps": 30})
    sizes = {}
    for codec in CODECS:
        settings = replace(DEFAULTS["diloco"], codec=codec)
        sizes[codec] = SIZE(settings, LAYOUT)
    assert sorted(sizes, key=lambda codec: -sizes[codec]) == list(CODECS)  # finest first
    seen = set()
    for step in (0.01, 0.8, 2.0, 5.0, 20.0):
        adapted = auto(swarm, step)
        hides = [
            codec
            for codec in CODECS
            if chosen_share(replace(DEFAULTS["diloco"], codec=codec), HOME, step, 4, sizes[codec])
            >= SHARE
        ]
        assert adapted.settings.codec == (hides[0] if hides else CODECS[-1])
        assert adapted.settings.inner_steps == 30
        limited = "the link is what limits" in adapted.lines[-1]
        assert limited == (not hides)
        seen.add(adapted.settings.codec)
    assert len(seen) >= 3  # the rule was tried where it matters


def test_coarse_codecs_come_with_error_feedback() -> None:
    swarm = Swarm.model_validate({"method": "diloco", "codec": "auto"})
    slow = auto(swarm, 0.01).settings
    fast = auto(swarm, 60).settings
    assert slow.codec == "top-k" and slow.feedback_decay == 0.95
    assert fast.codec == "fp32" and fast.feedback_decay == 0.0


def test_the_largest_density_that_hides() -> None:
    swarm = Swarm.model_validate({"method": "sparseloco", "density": "auto", "inner_steps": 30})
    found = [auto(swarm, step).settings.density for step in (0.01, 0.75, 5)]
    assert found == sorted(found) and found[0] == DENSITIES[-1] and found[-1] == DENSITIES[0]
    assert len(set(found)) >= 3


def test_gradients_are_exchanged_at_every_step() -> None:
    swarm = Swarm.model_validate({"method": "demo", "density": "auto"})
    adapted = auto(swarm, 0.5)
    assert adapted.settings.inner_steps == 1 and adapted.settings.density == DENSITIES[-1]
    assert "link is what limits" in adapted.lines[-1]


def test_what_the_recipe_says_stays() -> None:
    asked = {"method": "sparseloco", "inner_steps": 7, "codec": "2bit", "outer_momentum": 0.5}
    swarm = Swarm.model_validate(asked)
    found = auto(swarm, 0.01).settings
    assert {key: getattr(found, key) for key in asked} == asked


def test_without_a_link_the_methods_own_values_stay() -> None:
    swarm = Swarm.model_validate({"codec": "auto", "density": "auto"})
    adapted = auto(swarm, 1, None)
    assert (
        adapted.settings == resolve_settings(swarm, OPTIMIZER) and "not known" in adapted.lines[0]
    )


def test_contradictions_are_mistakes_here_too() -> None:
    swarm = Swarm.model_validate({"method": "muloco"})  # with AdamW inside
    with pytest.raises(UserError, match="muon"):
        auto(swarm, 1)


@pytest.mark.parametrize("method", ["diloco", "streaming", "sparseloco", "demo", "noloco"])
def test_bytes_are_those_of_a_contribution(method: str) -> None:
    settings = DEFAULTS[method]
    built = build_method(settings, LAYOUT)
    agreed, sizes = Agreed(0, torch.zeros(LAYOUT.count)), []
    for round in range(settings.fragments):
        part = built.fragment(round)
        local = torch.randn(sum(each.stop - each.start for each in part)) * 1e-3
        planes, _ = built.outgoing(agreed, built.begin(agreed), round, local, 1e-3)
        sizes.append(MESSAGE_BYTES + sum(len(plane) for plane in planes))
    mean = sum(sizes) / len(sizes)
    assert contribution_bytes(settings, LAYOUT) == pytest.approx(mean, rel=0.02)


def test_large_models_are_measured_by_a_part() -> None:
    large = Layout((("embedding.weight", (128_000, 4096)), ("scale", ()), ("norm", (4096,))))
    size = contribution_bytes(DEFAULTS["diloco"], large)  # int8, 4 GB of weights otherwise
    assert size == pytest.approx(large.count * 1.02, rel=0.02)


def test_the_table_shows_what_was_chosen() -> None:
    swarm = Swarm.model_validate({"method": "diloco"})
    adapted = auto(swarm, 0.1)
    marked = [line for line in adapted.lines if line.startswith("*")]
    assert len(marked) == 1 and f" {adapted.settings.inner_steps} " in marked[0]
    assert "1 Mbit/s up" in adapted.lines[0] and "4 peers" in adapted.lines[0]


def test_an_exchange_by_hand() -> None:
    # 1,000 bytes up at 100 a second, of two others down at 50, and ten calls of 0.1 s.
    assert exchange_seconds("diloco", 1000, Link(100, 50, 0.1), peers=3) == pytest.approx(51)
    assert exchange_seconds("noloco", 1000, Link(100, 50, 0.1), peers=9) == pytest.approx(30.7)
