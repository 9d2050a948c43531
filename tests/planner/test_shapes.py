"""Parameters and FLOPs of every family against transformers' own models, counted by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.scoring import with_head
from trainwright.planner.shapes import (
    count_parameters,
    flops_per_token,
    parameter_count,
    visible_keys,
)
from trainwright.recipe.presets import TABLE, Preset

# Odd on purpose: no number is a multiple of another unless the family insists.
ODD = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 6,
    "moe_intermediate_size": 22,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 18,
    "q_lora_rank": 26,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"head_dim": 14, "sliding_window": 7}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 22, "attention_bias": True}),
    ("gemma2", {"head_dim": 18, "sliding_window": 9}),
    ("gemma2", {"tie_word_embeddings": False, "attention_bias": True, "head_dim": 10}),
    ("gemma3_text", {"head_dim": 14, "sliding_window": 6, "sliding_window_pattern": 3}),
    ("phi3", {}),
    ("phi3", {"tie_word_embeddings": True, "sliding_window": 5}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    (
        "qwen2_moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 22,
            "shared_expert_intermediate_size": 34,
            "mlp_only_layers": [1],
        },
    ),
    (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 1, "decoder_sparse_step": 2, "head_dim": 14},
    ),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 4, "tie_word_embeddings": True}),
    ("deepseek_v3", DEEPSEEK),
    ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", {**DEEPSEEK, "attention_bias": True, "n_shared_experts": 1}),
]
VOCABULARY = 91
LENGTH = 24


def hf_model(config: dict[str, Any]) -> torch.nn.Module:
    settings = transformers.AutoConfig.for_model(**config)
    settings._attn_implementation = "eager"
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


def inside(module: torch.nn.Module, part: str) -> int:
    """Parameters of `module` whose names have `part` in them."""
    return sum(p.numel() for name, p in module.named_parameters() if part in name)


@pytest.mark.parametrize(("family", "keys"), CASES, ids=lambda case: str(case)[:60])
def test_parameters_are_those_of_transformers(family: str, keys: dict[str, Any]) -> None:
    config = new_hf_config(family, {**ODD, **keys}, VOCABULARY)
    model = hf_model(config)
    counted = count_parameters(decoder_config(config))
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.embedding == model.get_input_embeddings().weight.numel()
    for layer, block in enumerate(model.model.layers):
        part = counted.by_layer[layer]
        assert part.total == sum(p.numel() for p in block.parameters())
        assert part.attention == sum(p.numel() for p in block.self_attn.parameters())
        assert part.experts == inside(block, ".experts.")
        assert part.router == inside(block, "mlp.gate.")
    assert counted.blocks == sum(p.numel() for p in model.model.layers.parameters())
    assert counted.block == max(sum(p.numel() for p in b.parameters()) for b in model.model.layers)
    spec = decoder_config(config).experts
    active = 1 if spec is None else spec.per_token / spec.count
    assert counted.active == counted.total - inside(model, ".experts.") * (1 - active)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_has_a_score_and_no_output_matrix(tied: bool) -> None:
    plain = new_hf_config("qwen2", {**ODD, "tie_word_embeddings": tied}, VOCABULARY)
    scored = with_head(plain, scores=True)
    settings = transformers.AutoConfig.for_model(**scored)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(settings)
    counted = count_parameters(decoder_config(scored))
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.head == model.score.weight.numel() == 60
    less = flops_per_token(decoder_config(plain), 24) - flops_per_token(decoder_config(scored), 24)
    assert less == 2 * 60 * (VOCABULARY - 1)


@pytest.mark.parametrize(("family", "keys"), CASES, ids=lambda case: str(case)[:60])
def test_flops_are_those_of_the_matrix_products_that_run(family: str, keys: dict[str, Any]) -> None:
    hf_config = new_hf_config(family, {**ODD, **keys}, VOCABULARY)
    settings = transformers.AutoConfig.for_model(**hf_config)
    settings._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        settings, experts_implementation="eager"
    ).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long))
    by_module = counter.get_flop_counts()
    total = sum(by_module["Global"].values())
    # Angles of the rotary embedding are computed as a product there, and are no model FLOPs.
    rotary = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith("rotary_emb")
    )

    config = decoder_config(hf_config)
    width = 4 * config.num_heads * config.head_dim
    if config.latent is not None:
        width = 2 * config.num_heads * (config.head_dim + config.latent.value_dim)
    ours = flops_per_token(config, LENGTH)
    causal = sum(width * visible_keys(LENGTH, window) for window in config.layer_windows)
    whole_square = width * LENGTH * config.num_layers  # what eager attention multiplies out
    assert (ours - causal + whole_square) * LENGTH == pytest.approx(total - rotary, rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 23, 24, 100])
def test_visible_keys_are_the_area_under_the_causal_mask(window: int | None) -> None:
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    seen = (key <= query) & (query - key < (window or LENGTH))
    # The diagonal counts half: a token's own key lies on the border of the triangle.
    assert visible_keys(LENGTH, window) == pytest.approx(
        seen.sum().item() / LENGTH - min(window or LENGTH, LENGTH) / LENGTH / 2
    )


def test_training_flops_of_a_published_model() -> None:
    """Llama 3 8B at 8,192 tokens: 3 × (2·(N − embedding) + causal attention)."""
    [preset] = [each for each in TABLE if (each.family, each.size) == ("llama", "8b")]
    config = decoder_config(new_hf_config("llama", preset.config, preset.vocabulary))
    counted = count_parameters(config)
    vectors = 2 * 4096 * 32 + 4096
    products = 2 * (counted.total - counted.embedding - vectors)
    attention = 32 * 2 * 8192 * 4096
    assert flops_per_token(config, 8192) == products + attention


# As published on the models' cards, or as their safetensors say.
PUBLISHED = {
    ("llama", "1b"): 1_235_814_400,
    ("llama", "3b"): 3_212_749_824,
    ("llama", "8b"): 8_030_261_248,
    ("llama", "70b"): 70_553_706_496,
    ("mistral", "7b"): 7_241_732_096,
    ("mistral", "12b"): 12_247_782_400,
    ("qwen2", "0.5b"): 494_032_768,
    ("qwen2", "1.5b"): 1_543_714_304,
    ("qwen2", "7b"): 7_615_616_512,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("gemma2", "2b"): 2_614_341_888,
    ("gemma2", "9b"): 9_241_705_984,
    ("gemma3_text", "270m"): 268_098_176,
    ("gemma3_text", "1b"): 999_885_952,
    ("phi3", "3.8b"): 3_821_079_552,
    ("olmo2", "1b"): 1_484_916_736,
    ("olmo2", "7b"): 7_298_617_344,
    ("smollm3", "3b"): 3_075_098_624,
    ("granite", "2b"): 2_533_531_648,
    ("granite", "8b"): 8_170_848_256,
    ("mixtral", "47b"): 46_702_792_704,
    ("qwen2_moe", "14b"): 14_315_784_192,
    ("qwen3_moe", "30b"): 30_532_122_624,
    ("qwen3_moe", "235b"): 235_093_634_560,
    ("olmoe", "7b"): 6_919_161_856,
    ("deepseek_v3", "671b"): 671_026_404_352,
}


# Of the published models' cards, in billions.
ACTIVE = {
    ("mixtral", "47b"): 12.9,
    ("qwen2_moe", "14b"): 2.7,
    ("qwen3_moe", "30b"): 3.3,
    ("qwen3_moe", "235b"): 22,
    ("olmoe", "7b"): 1.3,
    ("deepseek_v3", "671b"): 37,
}


@pytest.mark.parametrize("name", ACTIVE, ids=str)
def test_active_parameters_are_those_of_the_cards(name: tuple[str, str]) -> None:
    [preset] = [each for each in TABLE if (each.family, each.size) == name]
    config = decoder_config(new_hf_config(preset.family, preset.config, preset.vocabulary))
    counted = count_parameters(config)
    # Cards count the embedding, or leave it out.
    both = (counted.active, counted.active - counted.embedding)
    assert any(count / 1e9 == pytest.approx(ACTIVE[name], rel=0.03) for count in both), both


@pytest.mark.parametrize("preset", TABLE, ids=lambda preset: f"{preset.family}-{preset.size}")
def test_presets_have_the_size_that_they_are_named_after(preset: Preset) -> None:
    config = decoder_config(new_hf_config(preset.family, preset.config, preset.vocabulary))
    count = parameter_count(config)
    if (preset.family, preset.size) in PUBLISHED:
        assert count == PUBLISHED[preset.family, preset.size]
    else:
        named = float(preset.size[:-1]) * {"m": 1e6, "b": 1e9}[preset.size[-1]]
        assert count == pytest.approx(named, rel=0.1)
