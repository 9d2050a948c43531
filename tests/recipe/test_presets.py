"""Named sizes, and how a recipe's own config lies over them."""

from __future__ import annotations

import pytest

from trainwright.errors import UserError
from trainwright.models.families import FAMILIES
from trainwright.recipe.presets import PRESETS, model_config
from trainwright.recipe.schema import ModelSection


def test_every_family_has_a_tiny_size() -> None:
    assert set(PRESETS) == set(FAMILIES)
    assert all("4m" in sizes for sizes in PRESETS.values())
    assert not any(
        "vocab_size" in config for sizes in PRESETS.values() for config in sizes.values()
    )


def test_config_lies_over_the_preset() -> None:
    plain = model_config(ModelSection(family="llama", preset="42m"))
    assert plain["hidden_size"] == 512
    changed = model_config(
        ModelSection(family="llama", preset="42m", config={"hidden_size": 256, "rope_theta": 5.0})
    )
    assert changed == {**plain, "hidden_size": 256, "rope_theta": 5.0}
    assert PRESETS["llama"]["42m"]["hidden_size"] == 512
    only = {"hidden_size": 8}
    assert model_config(ModelSection(family="llama", config=only)) == only


@pytest.mark.parametrize(
    ("family", "preset", "key", "says"),
    [
        ("lama", "4m", "model.family", "did you mean `llama`?"),
        ("zzz", "4m", "model.family", "there are `llama`, `mistral`"),
        ("qwen3", "4", "model.preset", "did you mean `4"),
        ("qwen3", "huge", "model.preset", "`0.6b`"),
    ],
)
def test_unknown_names(family: str, preset: str, key: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        model_config(ModelSection(family=family, preset=preset))
    [mistake] = caught.value.mistakes
    assert mistake.key == key
    assert says in mistake.fix
