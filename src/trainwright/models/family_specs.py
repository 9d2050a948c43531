"""The table of families: what sets each apart, and transformers' defaults for its config keys.

Data only, and torch-free; `models.families` reads a config by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Norms = Literal["pre", "post", "both"]
Get = Callable[[str], Any]  # a config's value for a key


@dataclass(frozen=True)
class Kind:
    """What a config's value may be: `name` says it to the user."""

    name: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


ANY = Kind("anything", lambda value: True)
COUNT = Kind("a whole number ≥ 1", lambda value: _is_whole(value) and value >= 1)
POSITION = Kind("a whole number ≥ 0", lambda value: _is_whole(value) and value >= 0)
WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
LIST = Kind("a list", lambda value: isinstance(value, list | tuple))
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
# Keys whose default does not tell what they may be.
KINDS = {
    "attention_dropout": SHARE,
    "attn_logit_softcapping": NUMBER,
    "bos_token_id": ANY,
    "embd_pdrop": SHARE,
    "eos_token_id": ANY,
    "final_logit_softcapping": NUMBER,
    "head_dim": COUNT,
    "hidden_act": ANY,  # checked against the activations that there are
    "hidden_activation": ANY,
    "layer_types": LIST,
    "max_window_layers": POSITION,
    "no_rope_layers": LIST,
    "num_key_value_heads": COUNT,
    "pad_token_id": WHOLE,
    "query_pre_attn_scalar": NUMBER,
    "resid_pdrop": SHARE,
    "rope_parameters": MAPPING,
    "rope_scaling": MAPPING,
    "sliding_window": COUNT,
    "use_bidirectional_attention": FLAG,
}


# Keys where null says something, rather than leaving the default.
NULLABLE = frozenset(
    {
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "head_dim",
        "num_key_value_heads",
        "pad_token_id",
        "sliding_window",
    }
)


def value_kind(key: str, default: Any) -> Kind:
    """What the value of a key with that default may be."""
    if key in KINDS:
        return KINDS[key]
    if isinstance(default, bool):
        return FLAG
    return COUNT if isinstance(default, int) else NUMBER


@dataclass(frozen=True)
class Family:
    """What sets a family apart. `defaults` are transformers' own for keys that a config leaves out.

    A key that is not among the defaults does not exist for the family: it is ignored when a model
    is loaded, as transformers does, and refused when a new one is described.
    """

    architecture: str
    defaults: Mapping[str, Any]
    norms: Norms = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False  # on top of the config's `attention_bias`
    fused_projections: bool = False
    scaled_embeddings: bool = False  # embeddings times sqrt(hidden_size)
    heads_divide_hidden: bool = False  # transformers insists on it even with `head_dim` given
    # Whether layer i sees a sliding window only, where the config has no `layer_types`.
    slides: Callable[[int, Get], bool] = lambda layer, get: False
    rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


# Keys without a default: a model's size is never guessed.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Keys that every family has.
COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "attention_dropout": 0.0,
    **NO_TOKENS,
}
# Keys of a saved config.json that say nothing about the model.
INERT = (
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
BIASES = {"attention_bias": False}
QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
GEMMA = {
    **BIASES,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": None,
    "pad_token_id": 0,
}


def turns(layer: int, get: Get) -> bool:
    """Whether layer i has rotary embeddings, by SmolLM3's keys."""
    pattern = get("no_rope_layers")
    if pattern is not None:
        return layer >= len(pattern) or bool(pattern[layer])
    return (layer + 1) % get("no_rope_layer_interval") != 0


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {**BIASES, "mlp_bias": False},
        heads_divide_hidden=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        slides=lambda layer, get: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        QWEN,
        qkv_bias=True,
        slides=lambda layer, get: get("use_sliding_window") and layer >= get("max_window_layers"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN, **BIASES, "head_dim": 128},
        qk_norm="head",
        slides=lambda layer, get: get("use_sliding_window") and layer >= get("max_window_layers"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        norms="both",
        norm_offset=1.0,
        scaled_embeddings=True,
        heads_divide_hidden=True,
        slides=lambda layer, get: layer % 2 == 0,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        norms="both",
        norm_offset=1.0,
        qk_norm="head",
        scaled_embeddings=True,
        heads_divide_hidden=True,
        slides=lambda layer, get: (layer + 1) % get("sliding_window_pattern") != 0,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "pad_token_id": 32_000,
        },
        fused_projections=True,
        slides=lambda layer, get: True,
        rope_kinds=("default", "longrope"),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**BIASES, "rms_norm_eps": 1e-5, "pad_token_id": 1},
        norms="post",
        qk_norm="projection",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **BIASES,
            "mlp_bias": False,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "pad_token_id": 128_004,
        },
        slides=lambda layer, get: get("use_sliding_window") and not turns(layer, get),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            **BIASES,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
    ),
}
