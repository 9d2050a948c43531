"""A model of the same family, small enough to run on every plan, shaped so that few are illegal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYERS, HEADS, HEAD_DIM, SEQUENCE, VOCABULARY, EXPERTS = 8, 8, 8, 64, 128, 8

# Sizes by Hugging Face's keys; only keys that the family has are changed.
SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": SEQUENCE,
    "original_max_position_embeddings": SEQUENCE,
    "query_pre_attn_scalar": HEAD_DIM,
    "max_window_layers": LAYERS // 2,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# Where these are larger than that, they become it: a window must be shorter than a row to matter.
MOST: dict[str, int] = {
    "sliding_window": 20,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrunk(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tiny model: the same family, norms, biases, ties, windows and ropes.

    It keeps fewer key-value heads than heads where the original has, and each layer pattern.
    """
    small = {key: value for key, value in hf_config.items() if key not in TOKENS}
    for key, size in SIZES.items():
        if small.get(key) is not None:
            small[key] = size
    for key, most in MOST.items():
        if small.get(key) is not None:
            small[key] = min(small[key], most)
    heads, kv_heads = hf_config["num_attention_heads"], hf_config.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = HEADS if kv_heads == heads else 2
    for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if small.get(key) is not None:
            small[key] = _repeated(small[key])
    for key in ("rope_scaling", "rope_parameters"):
        if small.get(key):
            small[key] = _shrunk_rope(small[key])
    # Larger than usual, so that gradients stand well above the rounding of fp32.
    return {**small, "initializer_range": 0.1, "pad_token_id": None}


def _repeated(pattern: list[Any]) -> list[Any]:
    """A pattern over the layers, for as many as the small model has."""
    times = -(-LAYERS // len(pattern))
    return (list(pattern) * times)[:LAYERS]


def _shrunk_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters for the small model: its context, and factors for its few channels."""
    small: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            value = _shrunk_rope(value)
        elif key == "original_max_position_embeddings":
            value = SEQUENCE // 2
        elif isinstance(value, list):
            value = value[: HEAD_DIM // 2]
        small[key] = value
    return small
