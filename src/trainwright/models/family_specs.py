"""The table of families: what sets each apart, and transformers' defaults for its config keys.

Data only, and torch-free; `models.families` reads a config by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Norms = Literal["pre", "post", "both"]
Get = Callable[[str], Any]  # a config's value for a key


@dataclass(frozen=True)
class Sparse:
    """How a family describes its mixture of experts; see `sparse_spec.ExpertsSpec`."""

    count: str  # the key of the number of experts
    width: str  # the key of an expert's width
    scores: Literal["softmax", "sigmoid"] = "softmax"
    always_normalised: bool = False  # whatever `norm_topk_prob` says
    corrected: bool = False
    shared_width: Callable[[Get], int] = lambda get: 0
    shared_gate: bool = False
    dense: Callable[[int, Get], bool] = lambda layer, get: False  # layers without experts
    module_on_disk: str = "mlp"
    names_on_disk: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


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
    # Keys under which some versions of transformers save another key's value, by that key.
    other_names: Mapping[str, str] = field(default_factory=dict)
    # Values that transformers saves where it means null.
    nothing: Mapping[str, Any] = field(default_factory=dict)
    sparse: Sparse | None = None
    latent: bool = False  # multi-head latent attention


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
# Router keys; jitter is noise on the router's input, which like dropout is read past.
ROUTER = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
QWEN_MOE = {
    **ROUTER,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
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


def has_plain_network(layer: int, get: Get) -> bool:
    """Whether layer i has a plain feed-forward network, by Qwen's keys."""
    return layer in (get("mlp_only_layers") or ()) or (layer + 1) % get("decoder_sparse_step") != 0


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
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **ROUTER,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "router_jitter_noise": 0.0,
        },
        slides=lambda layer, get: True,
        sparse=Sparse(
            "num_local_experts",
            "intermediate_size",
            always_normalised=True,
            module_on_disk="block_sparse_moe",
            names_on_disk=("w1", "w3", "w2"),
        ),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            **QWEN_MOE,
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "layer_types": None,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
        },
        slides=lambda layer, get: (
            get("use_sliding_window") and layer % 2 == 0 and layer < get("max_window_layers")
        ),
        nothing={"sliding_window": 0},
        sparse=Sparse(
            "num_experts",
            "moe_intermediate_size",
            shared_width=lambda get: get("shared_expert_intermediate_size"),
            shared_gate=True,
            dense=has_plain_network,
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **QWEN_MOE,
            **BIASES,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
        qk_norm="head",
        slides=lambda layer, get: get("use_sliding_window"),
        other_names={"num_experts": "num_local_experts"},
        sparse=Sparse("num_experts", "moe_intermediate_size", dense=has_plain_network),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            **BIASES,
            **ROUTER,
            "router_aux_loss_coef": 0.01,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "clip_qkv": None,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "norm_topk_prob": False,
            "pad_token_id": 1,
        },
        qk_norm="projection",
        sparse=Sparse("num_experts", "intermediate_size"),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **BIASES,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "qk_nope_head_dim": 128,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "num_nextn_predict_layers": 0,
        },
        sparse=Sparse(
            "n_routed_experts",
            "moe_intermediate_size",
            scores="sigmoid",
            corrected=True,
            shared_width=lambda get: get("moe_intermediate_size") * get("n_shared_experts"),
            dense=lambda layer, get: layer < get("first_k_dense_replace"),
        ),
        latent=True,
    ),
}
