"""From the recipe's swarm section to settings with nothing left open."""

from __future__ import annotations

import pytest

from trainwright.errors import UserError
from trainwright.recipe.schema import Optimizer
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.methods.build import METHODS
from trainwright.swarm.settings import DEFAULTS, Settings, resolve_settings


def resolved(optimizer: str = "adamw", **swarm: object) -> Settings:
    return resolve_settings(Swarm.model_validate(swarm), Optimizer.model_validate(optimizer))


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_that_names_a_method_has_its_settings(name: str) -> None:
    found = resolved("muon" if name == "muloco" else "adamw", method=name)
    assert vars(found) == vars(DEFAULTS[name]) | {"weight_decay": 0.1}


def test_what_the_recipe_says_comes_first_then_what_auto_was_found_to_be() -> None:
    swarm = Swarm(method="sparseloco", codec="auto", density=0.25, outer_learning_rate=0.65)
    found = resolve_settings(swarm, Optimizer(), inner_steps=77, codec="top-k-12bit", density=0.5)
    assert (found.inner_steps, found.codec, found.density) == (77, "top-k-12bit", 0.25)
    assert (found.outer_learning_rate, found.feedback_decay) == (0.65, 0.95)
    given = Swarm(method="diloco", inner_steps=12, codec="bf16")
    assert resolve_settings(given, Optimizer(), inner_steps=77, codec="int8").inner_steps == 12
    assert resolve_settings(given, Optimizer(), inner_steps=77, codec="int8").codec == "bf16"


def test_coarse_codecs_come_with_error_feedback() -> None:
    assert resolved(method="diloco", codec="2bit").feedback_decay == 0.9
    assert resolved(method="diloco", codec="2bit", feedback_decay=0.0).feedback_decay == 0.0
    assert resolved(method="diloco", codec="bf16").feedback_decay == 0.0
    assert resolved(method="sparseloco", codec="bf16").feedback_decay == 0.0


@pytest.mark.parametrize(
    ("key", "swarm"),
    [
        ("swarm.density", {"method": "diloco", "density": 0.1}),
        ("swarm.codec", {"method": "noloco", "codec": "2bit"}),
        ("swarm.feedback_decay", {"method": "noloco", "feedback_decay": 0.5}),
        ("optimizer.name", {"method": "muloco"}),
        ("swarm.fragments", {"method": "streaming", "inner_steps": 4, "fragments": 5}),
        ("swarm.delay", {"method": "streaming", "inner_steps": 30, "delay": 11}),
        ("swarm.delay", {"method": "distro", "delay": 2}),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(
    key: str, swarm: dict[str, object]
) -> None:
    with pytest.raises(UserError) as refused:
        resolved(**swarm)  # type: ignore[arg-type]
    assert [mistake.key for mistake in refused.value.mistakes] == [key]
    assert all(mistake.fix for mistake in refused.value.mistakes)
