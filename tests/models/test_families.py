"""Configs: transformers' defaults, both spellings of rope, and every mistake told at once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.models.cases import CASES, SHAPE, hf_config
from trainwright.errors import UserError
from trainwright.models.families import FAMILIES, decoder_config, new_hf_config

LLAMA = {**SHAPE, "model_type": "llama", "vocab_size": 97}


def mistakes(family: str = "llama", **keys: Any) -> dict[str, str]:
    """What is refused in a new model's config, by key."""
    with pytest.raises(UserError) as caught:
        new_hf_config(family, {**SHAPE, **keys}, 97)
    found = {
        m.key.removeprefix("model.config."): f"{m.what} {m.fix}" for m in caught.value.mistakes
    }
    assert len(found) == len(caught.value.mistakes), "a key is told twice"
    return found


def test_reading_configs_imports_no_torch() -> None:
    code = (
        "import sys; import trainwright.models.families, trainwright.models.directory; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A config.json may leave keys out; its class then fills them in, and so must we."""
    from transformers import AutoConfig

    bare = {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 7,
        "num_attention_heads": 32,
        "vocab_size": 150_000,
    }
    if FAMILIES[family].latent:
        bare["num_key_value_heads"] = 32  # its class has 128, which fits its own heads only
    full = AutoConfig.for_model(family, **bare).to_dict()
    assert decoder_config({**bare, "model_type": family}) == decoder_config(full)


@pytest.mark.parametrize("name", CASES)
def test_new_configs_are_whole(name: str) -> None:
    """transformers adds nothing that changes the model: its own defaults find no gap to fill."""
    from transformers import AutoConfig

    hf = hf_config(name)
    keys = {key: value for key, value in hf.items() if key not in ("model_type", "architectures")}
    full = AutoConfig.for_model(hf["model_type"], **keys).to_dict()
    assert decoder_config(full) == decoder_config(hf)
    assert [full[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [None] * 3


def test_a_key_given_as_null_stays_null() -> None:
    assert set(hf_layers("mistral", sliding_window=None)) == {None}
    assert set(hf_layers("mistral")) == {4096}


def hf_layers(family: str, **keys: Any) -> tuple[int | None, ...]:
    return decoder_config(new_hf_config(family, {**SHAPE, **keys}, 97)).layer_windows


def test_windows_follow_each_familys_pattern() -> None:
    eight = {"num_hidden_layers": 8, "sliding_window": 7}
    assert hf_layers("gemma2", **eight) == (7, None) * 4
    assert hf_layers("gemma3_text", **eight) == (7, 7, 7, 7, 7, None, 7, 7)
    assert hf_layers("qwen2", **eight) == (None,) * 8
    late = {"use_sliding_window": True, "max_window_layers": 6}
    assert hf_layers("qwen3", **eight, **late) == (None,) * 6 + (7, 7)
    assert hf_layers("smollm3", **eight, use_sliding_window=True)[3] == 7


def test_every_mistake_is_told_at_once() -> None:
    found = mistakes(
        hidden_size=50,
        num_key_value_heads=3,
        intermediate_size=0,
        hidden_act="swosh",
        hiden_size=3,
        rope_scaling={"rope_type": "llama3", "factor": 8.0},
        pad_token_id=97,
    )
    assert set(found) == {
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "hidden_act",
        "hiden_size",
        "rope_scaling.low_freq_factor",
        "rope_scaling.high_freq_factor",
        "pad_token_id",
    }
    assert "'hidden_size'" in found["hiden_size"]
    assert "1, 2, 5, 10, 25, 50" in found["num_attention_heads"]


@pytest.mark.parametrize(
    ("family", "keys", "refused"),
    [
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("llama", {"vocab_size": 96}, "vocab_size"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
        ("llama", {"rope_scaling": {"type": "su2"}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings"),
        ("phi3", {"rope_scaling": {"type": "linear"}}, "rope_scaling.rope_type"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 6}},
            "rope_scaling.short_factor",
        ),
        ("qwen2", {"head_dim": None, "hidden_size": 50}, "num_attention_heads"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"num_key_value_heads": 4, "n_group": 3}, "n_group"),
        ("deepseek_v3", {"num_key_value_heads": 4, "topk_group": 9}, "topk_group"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 4, "n_routed_experts": 16, "topk_group": 1},
            "num_experts_per_tok",
        ),
        ("deepseek_v3", {"num_key_value_heads": 4, "qk_rope_head_dim": 5}, "qk_rope_head_dim"),
    ],
)
def test_mistakes_name_their_key(family: str, keys: dict[str, Any], refused: str) -> None:
    assert list(mistakes(family, **keys)) == [refused]


JUNK = (None, True, -1, 0, 1.5, "", "x", [], ["x"], {}, {"a": 1}, [{}])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_any_key_is_worse_than_a_mistake(family: str) -> None:
    """Whatever stands in a config, it is read or refused; nothing else is raised."""
    refused = 0
    shape = {**SHAPE, "num_key_value_heads": 4} if FAMILIES[family].latent else SHAPE
    for key in new_hf_config(family, shape, 97).keys() | {
        "rope_scaling",
        "layer_types",
        "head_dim",
    }:
        for value in JUNK:
            try:
                new_hf_config(family, {**shape, key: value}, 97)
            except UserError:
                refused += 1
    rope_keys = ("rope_type", "factor", "short_factor", "rope_theta", "partial_rotary_factor")
    for kind in ("linear", "yarn", "longrope", "llama3", "dynamic"):
        for key in rope_keys:
            for value in JUNK:
                try:
                    new_hf_config(family, {**shape, "rope_scaling": {"type": kind, key: value}}, 97)
                except UserError:
                    refused += 1
    assert refused > 300


def test_unknown_families_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="'gemma2'") as caught:
        new_hf_config("gemma-2", SHAPE, 97)
    assert caught.value.mistakes[0].key == "model.family"
    with pytest.raises(UserError, match="unknown model family 'bert'"):
        decoder_config({**LLAMA, "model_type": "bert"})


def test_inert_keys_of_a_pasted_config_are_taken_in_silence() -> None:
    pasted = {**SHAPE, "torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.1"}
    assert new_hf_config("llama", pasted, 97) == new_hf_config("llama", SHAPE, 97)
