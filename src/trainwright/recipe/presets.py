"""Named sizes for new models: Hugging Face config keys, by family and size.

Sizes named after a published model have its shape. Long-context rope scaling is left out: it is
fitted to a trained model later on. No preset has a `vocab_size`; that is the tokenizer's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.recipe.schema import ModelSection


@dataclass(frozen=True)
class Preset:
    """One size: its config, and the vocabulary that its name reckons with."""

    family: str
    size: str
    vocabulary: int
    config: dict[str, Any]


def _preset(
    name: str, vocabulary: int, hidden: int, layers: int, heads: str, ffn: int, **keys: Any
) -> Preset:
    """A row of the table; `heads` is "query/key-value"."""
    family, size = name.split()
    queries, key_values = heads.split("/")
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": int(queries),
        "num_key_value_heads": int(key_values),
        "intermediate_size": ffn,
    }
    return Preset(family, size, vocabulary, {**shape, **keys})


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LLAMA3: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
_QWEN: dict[str, Any] = {"max_position_embeddings": 32_768, "rope_theta": 1_000_000.0}
_GEMMA_TINY: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 128}
_GEMMA3: dict[str, Any] = {"max_position_embeddings": 32_768}
_OLMO: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-6,
}
_GRANITE: dict[str, Any] = {
    **_TIED,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
_MIXTRAL: dict[str, Any] = {
    "max_position_embeddings": 32_768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN3_EXPERTS: dict[str, Any] = {
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}

# Columns: family and size, vocabulary, hidden, layers, heads/key-value heads, feed-forward width.
TABLE: tuple[Preset, ...] = (
    _preset("llama 4m", 4096, 256, 4, "4/4", 688, **_TIED),
    _preset("llama 15m", 32_000, 288, 6, "6/6", 768, **_TIED),
    _preset("llama 42m", 16_384, 512, 8, "8/8", 1408),
    _preset("llama 110m", 32_000, 768, 12, "12/12", 2048, **_TIED),
    _preset("llama 350m", 32_000, 1024, 24, "16/16", 2816, **_TIED),
    _preset("llama 1b", 128_256, 2048, 16, "32/8", 8192, **_TIED, **_LLAMA3),
    _preset("llama 3b", 128_256, 3072, 28, "24/8", 8192, **_TIED, **_LLAMA3),
    _preset("llama 8b", 128_256, 4096, 32, "32/8", 14_336, **_LLAMA3),
    _preset("llama 70b", 128_256, 8192, 80, "64/8", 28_672, **_LLAMA3),
    _preset("mistral 4m", 4096, 256, 4, "4/2", 704, **_TIED, sliding_window=256),
    _preset("mistral 7b", 32_000, 4096, 32, "32/8", 14_336, max_position_embeddings=32_768),
    _preset(
        "mistral 12b",
        131_072,
        5120,
        40,
        "32/8",
        14_336,
        head_dim=128,
        sliding_window=None,
        rope_theta=1_000_000.0,
    ),
    _preset("qwen2 4m", 4096, 256, 4, "4/2", 704, **_TIED),
    _preset("qwen2 0.5b", 151_936, 896, 24, "14/2", 4864, **_TIED, **_QWEN),
    _preset("qwen2 1.5b", 151_936, 1536, 28, "12/2", 8960, **_TIED, **_QWEN),
    _preset("qwen2 7b", 152_064, 3584, 28, "28/4", 18_944, **_QWEN),
    _preset("qwen2 72b", 152_064, 8192, 80, "64/8", 29_568, **_QWEN),
    _preset("qwen3 4m", 4096, 256, 4, "4/2", 704, **_TIED, head_dim=64),
    _preset("qwen3 0.6b", 151_936, 1024, 28, "16/8", 3072, **_TIED, **_QWEN, head_dim=128),
    _preset("qwen3 1.7b", 151_936, 2048, 28, "16/8", 6144, **_TIED, **_QWEN, head_dim=128),
    _preset("qwen3 4b", 151_936, 2560, 36, "32/8", 9728, **_TIED, **_QWEN, head_dim=128),
    _preset("qwen3 8b", 151_936, 4096, 36, "32/8", 12_288, **_QWEN, head_dim=128),
    _preset("qwen3 14b", 151_936, 5120, 40, "40/8", 17_408, **_QWEN, head_dim=128),
    _preset("qwen3 32b", 151_936, 5120, 64, "64/8", 25_600, **_QWEN, head_dim=128),
    _preset("gemma2 4m", 4096, 256, 4, "4/2", 704, **_GEMMA_TINY),
    _preset("gemma2 2b", 256_000, 2304, 26, "8/4", 9216, head_dim=256),
    _preset("gemma2 9b", 256_000, 3584, 42, "16/8", 14_336, head_dim=256),
    _preset(
        "gemma2 27b", 256_000, 4608, 46, "32/16", 36_864, head_dim=128, query_pre_attn_scalar=144
    ),
    _preset("gemma3_text 4m", 4096, 256, 4, "4/1", 704, **_GEMMA_TINY, sliding_window_pattern=2),
    _preset("gemma3_text 270m", 262_144, 640, 18, "4/1", 2048, sliding_window=512, **_GEMMA3),
    _preset("gemma3_text 1b", 262_144, 1152, 26, "4/1", 6912, sliding_window=512, **_GEMMA3),
    _preset("gemma3_text 4b", 262_208, 2560, 34, "8/4", 10_240, sliding_window=1024, **_GEMMA3),
    _preset("gemma3_text 12b", 262_208, 3840, 48, "16/8", 15_360, sliding_window=1024, **_GEMMA3),
    _preset(
        "gemma3_text 27b",
        262_208,
        5376,
        62,
        "32/16",
        21_504,
        head_dim=128,
        query_pre_attn_scalar=168,
        sliding_window=1024,
        **_GEMMA3,
    ),
    _preset("phi3 4m", 4096, 256, 4, "4/2", 704, **_TIED),
    _preset("phi3 3.8b", 32_064, 3072, 32, "32/32", 8192, sliding_window=2047),
    _preset("phi3 14b", 32_064, 5120, 40, "40/10", 17_920, sliding_window=2047),
    _preset("olmo2 4m", 4096, 256, 4, "4/4", 688, **_TIED),
    _preset("olmo2 1b", 100_352, 2048, 16, "16/16", 8192, **_OLMO),
    _preset("olmo2 7b", 100_352, 4096, 32, "32/32", 11_008, **_OLMO),
    _preset("olmo2 13b", 100_352, 5120, 40, "40/40", 13_824, **_OLMO),
    _preset("olmo2 32b", 100_352, 5120, 64, "40/8", 27_648, **_OLMO),
    _preset("smollm3 4m", 4096, 256, 4, "4/2", 704),
    _preset("smollm3 3b", 128_256, 2048, 36, "16/4", 11_008, max_position_embeddings=65_536),
    _preset(
        "granite 4m",
        4096,
        256,
        4,
        "4/2",
        704,
        **_GRANITE,
        logits_scaling=8.0,
        attention_multiplier=1 / 64,
    ),
    _preset(
        "granite 2b",
        49_155,
        2048,
        40,
        "32/8",
        8192,
        **_GRANITE,
        logits_scaling=8.0,
        attention_multiplier=1 / 64,
    ),
    _preset(
        "granite 8b",
        49_155,
        4096,
        40,
        "32/8",
        12_800,
        **_GRANITE,
        logits_scaling=16.0,
        attention_multiplier=1 / 128,
    ),
    _preset("mixtral 4m", 4096, 192, 4, "4/2", 144, **_TIED, num_local_experts=8),
    _preset("mixtral 47b", 32_000, 4096, 32, "32/8", 14_336, **_MIXTRAL),
    _preset("mixtral 141b", 32_768, 6144, 56, "48/8", 16_384, **_MIXTRAL),
    _preset(
        "qwen2_moe 4m",
        4096,
        192,
        4,
        "4/4",
        512,
        **_TIED,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
    ),
    _preset(
        "qwen2_moe 14b",
        151_936,
        2048,
        24,
        "16/16",
        5632,
        **_QWEN,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    _preset(
        "qwen3_moe 4m",
        4096,
        192,
        4,
        "4/2",
        512,
        **_TIED,
        head_dim=48,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=160,
    ),
    _preset(
        "qwen3_moe 30b",
        151_936,
        2048,
        48,
        "32/4",
        6144,
        **_QWEN3_EXPERTS,
        moe_intermediate_size=768,
    ),
    _preset(
        "qwen3_moe 235b",
        151_936,
        4096,
        94,
        "64/4",
        12_288,
        **_QWEN3_EXPERTS,
        moe_intermediate_size=1536,
    ),
    _preset("olmoe 4m", 4096, 192, 4, "4/4", 160, **_TIED, num_experts=8, num_experts_per_tok=2),
    _preset(
        "olmoe 7b", 50_304, 2048, 16, "16/16", 1024, max_position_embeddings=4096, num_experts=64
    ),
    _preset(
        "deepseek_v3 4m",
        4096,
        192,
        4,
        "4/4",
        512,
        **_TIED,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=160,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    _preset("deepseek_v3 671b", 129_280, 7168, 61, "128/128", 18_432),
)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {}
for _row in TABLE:
    PRESETS.setdefault(_row.family, {})[_row.size] = _row.config


def model_config(section: ModelSection) -> dict[str, Any]:
    """The config keys of a new model: its preset's, with the section's own `config` over them.

    Raises `UserError` for a family or a preset that there is not, with the nearest one.
    """
    if section.family is None:
        raise UserError("only a new model, one with a `family`, has a preset and config")
    if section.family not in PRESETS:
        what = f"there is no family `{section.family}`"
        raise UserError(Mistake(what, _nearest(section.family, list(PRESETS)), "model.family"))
    sizes = PRESETS[section.family]
    if section.preset is None:
        return dict(section.config)
    if section.preset not in sizes:
        what = f"{section.family} has no preset `{section.preset}`"
        raise UserError(Mistake(what, _nearest(section.preset, list(sizes)), "model.preset"))
    return {**sizes[section.preset], **section.config}


def _nearest(given: str, names: list[str]) -> str:
    close = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.6)
    known = ", ".join(f"`{name}`" for name in names)
    return f"did you mean `{close[0]}`? There are {known}" if close else f"there are {known}"
