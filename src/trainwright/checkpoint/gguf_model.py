"""What llama.cpp knows of a model: its architecture's name, its key-values, and what it cannot say.

llama.cpp has each architecture's computation in code (src/models), not in the file. So a config is
held against that code, and refused where the file would load and compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.errors import Mistake, UserError
from trainwright.models.families import DecoderConfig
from trainwright.models.latent_attention import LATENT_EPS
from trainwright.models.rope import FREQUENCIES
from trainwright.models.rope_spec import RopeSpec
from trainwright.models.scoring import gives_scores

PLAIN = ("default", "linear", "yarn")
SIGMOID = 2  # llama.cpp's number for it among the experts' gating functions


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's code for an architecture does; families share one where it does the same."""

    name: str
    turns_neighbours: bool = False  # rope turns channels 2i and 2i + 1: q and k rows are reordered
    ropes: tuple[str, ...] = PLAIN
    part_turns: bool = False  # rope may turn the first channels of a head alone
    free_head_dim: bool = True  # heads × head_dim need not be the width of the model
    output_bias: bool = False
    mlp_bias: bool = False
    window_period: int = 0  # has windows, in all layers of so many but the last; 0: has none
    scaled_by_key: bool = False  # attention, logits, residuals and embeddings have factors
    needs_output: bool = False  # has no tied embeddings: they are written twice
    tied_alone: bool = False  # has no output matrix of its own
    activations: tuple[str, ...] = ("silu",)
    normalises_experts: bool | None = None  # None: by a key


GELU = ("gelu_pytorch_tanh", "gelu_new")
_LLAMA = Architecture(
    "llama",
    turns_neighbours=True,
    ropes=(*PLAIN, "llama3", "longrope"),
    output_bias=True,
    mlp_bias=True,
    normalises_experts=True,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture("qwen2", free_head_dim=False),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture(
        "qwen2moe", free_head_dim=False, needs_output=True, normalises_experts=False
    ),
    "qwen3_moe": Architecture("qwen3moe", normalises_experts=True),
    "gemma2": Architecture(
        "gemma2", ropes=("default", "linear"), window_period=2, tied_alone=True, activations=GELU
    ),
    "gemma3_text": Architecture(
        "gemma3", ropes=("default", "linear"), window_period=6, activations=GELU
    ),
    "phi3": Architecture("phi3", ropes=("default", "longrope"), part_turns=True),
    "olmo2": Architecture("olmo2", free_head_dim=False, needs_output=True),
    "olmoe": Architecture(
        "olmoe", free_head_dim=False, needs_output=True, normalises_experts=False
    ),
    "smollm3": Architecture("smollm3", turns_neighbours=True),
    "granite": Architecture(
        "granite",
        turns_neighbours=True,
        ropes=(*PLAIN, "llama3", "longrope"),
        output_bias=True,
        mlp_bias=True,
        scaled_by_key=True,
    ),
    "deepseek_v3": Architecture("deepseek2", ropes=("default", "yarn")),
}


def architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """llama.cpp's architecture for a config.json; UserError where there is none for it."""
    family = hf_config.get("model_type")
    if gives_scores(hf_config):
        what = "a reward model cannot be a GGUF file here: llama.cpp's language models write text"
        raise UserError(what, "export it without gguf")
    if family not in ARCHITECTURES:
        what = f"GGUF files of the family {family!r} are not written here"
        raise UserError(what, f"it can be done for {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[family]


def check_model(config: DecoderConfig, arch: Architecture) -> None:
    """UserError with everything in the config that llama.cpp would compute otherwise."""
    heads, experts, latent = config.num_heads * config.head_dim, config.experts, config.latent
    rope = _rope(config)
    wrong = {
        f"rotary embeddings of type {rope.kind!r}": rope.kind not in arch.ropes,
        "rotary embeddings that turn a part of each head": not arch.part_turns
        and latent is None
        and rope.dim != config.head_dim,
        "YaRN without rounded bounds (`truncate: false`)": rope.kind == "yarn"
        and not rope.truncate,
        f"heads of {config.head_dim} channels, {heads} in all": not arch.free_head_dim
        and heads != config.hidden_size,
        "a bias after attention": config.output_bias and not arch.output_bias,
        "biases in the feed-forward network": config.mlp_bias and not arch.mlp_bias,
        f"the activation {config.activation}": config.activation not in arch.activations,
        "an output matrix apart from the embeddings": arch.tied_alone
        and not config.tied_embeddings,
        "layers without rotary embeddings in this pattern": not _turns_as_known(config),
        "queries scaled by another number": not _scaled_as_known(config, arch),
        "stretched rotary embeddings in layers with a window": config.family == "gemma3_text"
        and any(
            spec is not None and spec.kind != "default"
            for spec, window in zip(config.layer_ropes, config.layer_windows, strict=True)
            if window is not None
        ),
        "a model of this family without experts": experts is None
        and (latent is not None or arch.name.endswith("moe")),
        "attention or logits without a soft cap": config.family == "gemma2"
        and None in (config.attention_softcap, config.logit_softcap),
    }
    if experts is not None:
        normalised = arch.normalises_experts
        wrong["experts in some layers only"] = latent is None and not all(experts.layers)
        wrong["experts between plain layers"] = sorted(experts.layers) != list(experts.layers)
        wrong["this way of weighing experts (`norm_topk_prob`)"] = (
            normalised is not None and normalised != experts.normalised
        )
        wrong["a shared expert that is no multiple of the others"] = (
            latent is not None and experts.shared_width % experts.width != 0
        )
    if latent is not None:
        vocabulary = (config.num_layers, config.vocab_size)
        wrong["rotary embeddings that are not interleaved"] = not latent.interleaved
        wrong["norms with `rms_norm_eps` other than 1e-6"] = config.norm_eps != LATENT_EPS
        # By these sizes it knows DeepSeek-V2-Lite and its like, whose queries are made directly.
        wrong[f"{config.num_layers} layers and queries from a latent vector"] = (
            latent.query_rank is not None
            and (config.num_layers in (26, 27) or vocabulary == (48, 128_256))
        )
        wrong["YaRN unless `mscale` and `mscale_all_dim` are the same"] = rope.kind == "yarn" and (
            not _mscale(config) or not math.isclose(rope.cos_scale, 1.0)
        )
    mistakes = [
        Mistake(f"llama.cpp's {arch.name} does not know {what}", "export without gguf")
        for what, found in wrong.items()
        if found
    ]
    if mistakes:
        raise UserError(mistakes)


def model_values(config: DecoderConfig, arch: Architecture) -> tuple[dict[str, Any], list[str]]:
    """The key-values that describe the model, and notes on what the file says otherwise."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    notes: list[str] = []
    windows = [window for window in config.layer_windows if window is not None]
    if arch.window_period:
        values |= _window_values(config, arch.window_period)
    elif windows and min(windows) < config.max_positions:
        values["context_length"] = min(windows)
        notes.append(
            f"llama.cpp's {arch.name} has no sliding window: context_length is {min(windows)} "
            "tokens, within which nothing differs"
        )
    if config.attention_softcap is not None:
        values["attn_logit_softcapping"] = config.attention_softcap
    if config.logit_softcap is not None:
        values["final_logit_softcapping"] = config.logit_softcap
    if arch.scaled_by_key:
        values["attention.scale"] = config.attention_scale
        values["embedding_scale"] = config.embedding_multiplier
        values["residual_scale"] = config.residual_multiplier
        values["logit_scale"] = 1 / config.logit_multiplier
    if _rope(config).kind == "longrope":
        notes.append("llama.cpp takes LongRoPE's long factors by its context size, not a text's")
    values |= _expert_values(config) | _latent_values(config) | _rope_values(config)
    return {f"{arch.name}.{key}": value for key, value in values.items()}, notes


def rope_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """What frequencies are divided by, for ropes that llama.cpp reads from the file: [pairs].

    Llama 3's as in its reference code (`apply_scaling`); LongRoPE's are the config's own lists.
    """
    rope = _rope(config)
    if rope.kind == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope.long_factor),
            "rope_factors_short.weight": torch.tensor(rope.short_factor),
        }
    if rope.kind != "llama3":
        return {}
    return {"rope_freqs.weight": FREQUENCIES["default"](rope) / FREQUENCIES["llama3"](rope)}


def _rope(config: DecoderConfig) -> RopeSpec:
    """The rope of the layers that see everything, which is the one that may be stretched."""
    pairs = zip(config.layer_ropes, config.layer_windows, strict=True)
    ropes = sorted(
        ((rope, window is not None) for rope, window in pairs if rope is not None),
        key=lambda pair: pair[1],
    )
    if not ropes:
        raise UserError("llama.cpp knows no model of this family without rotary embeddings")
    return ropes[0][0]


def _mscale(config: DecoderConfig) -> float:
    """YaRN's `mscale_all_dim`, 0 where there is none."""
    parameters = config.hf.get("rope_scaling") or config.hf.get("rope_parameters") or {}
    return float(parameters.get("mscale_all_dim") or 0.0)


def _turns_as_known(config: DecoderConfig) -> bool:
    """SmolLM3's every fourth layer has no rotary embeddings; all other models' layers have."""
    turns = [rope is not None for rope in config.layer_ropes]
    if config.family == "smollm3":
        return turns == [(layer + 1) % 4 != 0 for layer in range(config.num_layers)]
    return all(turns)


def _scaled_as_known(config: DecoderConfig, arch: Architecture) -> bool:
    """Whether queries are scaled as the code does it; Gemma's 27B models are known by depth."""
    if arch.scaled_by_key or config.latent is not None:
        return True
    width = config.head_dim
    if (config.family, config.num_layers) in (("gemma2", 46), ("gemma3_text", 62)):
        width = config.hidden_size // config.num_heads
    return math.isclose(config.attention_scale, width**-0.5, rel_tol=1e-6)


def _window_values(config: DecoderConfig, period: int) -> dict[str, Any]:
    """Gemma's windows: their width, which layers have one, and how those turn."""
    slides = [window is not None for window in config.layer_windows]
    if not any(slides):
        # Gemma 2's code has a window whatever the file says: one that nothing reaches.
        unreached = config.max_positions if config.family == "gemma2" else 0
        return {"attention.sliding_window": unreached}
    window = next(window for window in config.layer_windows if window is not None)
    values: dict[str, Any] = {"attention.sliding_window": window}
    if slides != [layer % period < period - 1 for layer in range(config.num_layers)]:
        values["attention.sliding_window_pattern"] = slides
    windowed = config.layer_ropes[slides.index(True)]
    if windowed is not None:
        values["rope.freq_base_swa"] = windowed.theta
    return values


def _expert_values(config: DecoderConfig) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    values: dict[str, Any] = {
        "expert_count": experts.count,
        "expert_used_count": experts.per_token,
        "expert_feed_forward_length": experts.width,
    }
    if experts.shared_gate:
        values["expert_shared_feed_forward_length"] = experts.shared_width
    if config.latent is not None:
        values |= {
            "expert_shared_count": experts.shared_width // experts.width,
            "expert_group_count": experts.groups,
            "expert_group_used_count": experts.groups_per_token,
            "expert_gating_func": SIGMOID,
            "expert_weights_scale": experts.scaling,
            "expert_weights_norm": experts.normalised,
            "leading_dense_block_count": experts.layers.index(True),
        }
    return values


def _latent_values(config: DecoderConfig) -> dict[str, Any]:
    """Latent attention, which llama.cpp computes as one head of keys that all queries share."""
    latent = config.latent
    if latent is None:
        return {}
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": latent.query_rank or 0,
        "attention.kv_lora_rank": latent.rank,
        "attention.key_length": latent.rank + latent.rope_dim,
        "attention.value_length": latent.rank,
        "attention.key_length_mla": latent.plain_dim + latent.rope_dim,
        "attention.value_length_mla": latent.value_dim,
    }


def _rope_values(config: DecoderConfig) -> dict[str, Any]:
    rope = _rope(config)
    values: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.dim}
    if rope.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    elif rope.kind == "longrope":
        values |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.attn_factor": rope.cos_scale,
        }
    elif rope.kind == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        if config.latent is not None:
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * _mscale(config)
        else:
            # llama.cpp multiplies cos and sin by this and by the paper's own factor.
            values["rope.scaling.attn_factor"] = rope.cos_scale / (1 + 0.1 * math.log(rope.factor))
    return values
