"""Small models of every family in odd shapes, beside transformers' own with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainwright.models.decoder import Decoder
from trainwright.models.families import decoder_config, new_hf_config

VOCABULARY = 97
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0], "rope_type": "longrope"}

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 18,
    "q_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
# name → (family, keys over SHAPE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-odd": (
        "llama",
        {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama-dynamic": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 10}),
    "mistral-full": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"hidden_size": 46, "head_dim": 14, "attention_bias": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 20,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 18,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "rope_theta": 300.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "num_key_value_heads": 1,
        },
    ),
    "gemma3-nested-rope": (
        "gemma3_text",
        {
            "head_dim": 12,
            "sliding_window": 4,
            "attention_bias": True,
            "final_logit_softcapping": 5.0,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 5}),
    "phi3-short": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": LONG,
            "original_max_position_embeddings": 30,
        },
    ),
    "phi3-long": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": LONG,
            "original_max_position_embeddings": 12,
        },
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    "smollm3": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "no_rope_layers": [1, 0, 1, 0],
            "mlp_bias": True,
        },
    ),
    "smollm3-interval": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 14,
            "moe_intermediate_size": 18,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe-plain-sums": (
        "qwen3_moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 4, "num_key_value_heads": 4}),
    "deepseek": ("deepseek_v3", DEEPSEEK),
    "deepseek-yarn": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "rms_norm_eps": 1e-3,
            "attention_bias": True,
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
    "deepseek-halves": ("deepseek_v3", {**DEEPSEEK, "rope_interleave": False}),
}
# Their angles change with the document's length, and a cache keeps keys as they were turned: the
# whole at once is another matter than step by step, in transformers too.
LENGTH_DEPENDENT = ("llama-dynamic", "phi3-long")


def hf_config(name: str) -> dict[str, Any]:
    """The config.json of a case."""
    family, keys = CASES[name]
    shape = SHAPE
    if family == "phi3" and "partial_rotary_factor" in keys:
        keys = {**keys, "max_position_embeddings": 64}
    return new_hf_config(family, {**shape, **keys}, VOCABULARY)


def reference_model(hf: dict[str, Any]) -> Any:
    """transformers' model of a config, every parameter random: norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in hf.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(hf["model_type"], **keys)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    randomise(model)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if parameter.dim() == 1:
                parameter += 0.3
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)


def decoder_like(reference: Any, hf: dict[str, Any]) -> Decoder:
    """Our decoder with the reference's weights, by name."""
    decoder = Decoder(decoder_config(hf)).eval()
    state = by_our_names(reference.state_dict())
    if decoder.config.tied_embeddings:
        del state["lm_head.weight"]
    decoder.load_state_dict(state)
    return decoder


def by_our_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors as we name them: it stacks gates and ups of experts in one tensor."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            result[f"{prefix}gate_proj"], result[f"{prefix}up_proj"] = tensor.chunk(2, dim=1)
        else:
            result[name] = tensor
    return result


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
