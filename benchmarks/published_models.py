"""Shapes of the models in published runs: from the row, or by name where a row has no shape.

Named shapes are those of the config.json that each model's authors publish on huggingface.co.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainwright.models.families import DecoderConfig
from trainwright.models.sparse_spec import ExpertsSpec, LatentSpec


class UnknownRunError(Exception):
    """Why a row cannot be predicted."""


def _named(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any
) -> dict[str, Any]:
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads}
    return {**sizes, "ffn": ffn, "vocab": vocab, **more}


def _experts(count: int, per_token: int, width: int, shared_width: int = 0) -> dict[str, Any]:
    return {
        "count": count,
        "per_token": per_token,
        "width": width,
        "shared_width": shared_width,
    }


_QWEN = {"head_dim": 128, "qk_norm": "head"}
_OSS = {"head_dim": 64, "window": 128}
_DEEPSEEK = {
    "head_dim": 192,
    "dense_layers": 3,
    "latent": LatentSpec(1536, 512, 128, 64, 128, interleaved=True),
}
NAMED = {
    "llama38b": _named(32, 4096, 32, 8, 14336, 128256),
    "llama370b": _named(80, 8192, 64, 8, 28672, 128256),
    "llama3405b": _named(126, 16384, 128, 8, 53248, 128256),
    "qwen330ba3b": _named(48, 2048, 32, 4, 6144, 151936, experts=_experts(128, 8, 768), **_QWEN),
    "qwen3235ba22b": _named(
        94, 4096, 64, 4, 12288, 151936, experts=_experts(128, 8, 1536), **_QWEN
    ),
    "gptoss120b": _named(36, 2880, 64, 8, 2880, 201088, experts=_experts(128, 4, 2880), **_OSS),
    "deepseekv3": _named(
        61, 7168, 128, 128, 18432, 129280, experts=_experts(256, 8, 2048, 2048), **_DEEPSEEK
    ),
}


def model_config(row: Mapping[str, str]) -> DecoderConfig:
    """The decoder of a row. Raises `UnknownRunError` where neither its shape nor its name tells."""
    name = re.sub(r"\(.*\)|[^a-z0-9]", "", row["model"].lower())
    if row["layers"] and row["hidden"]:
        return _config(row["model"], **_shape(row))
    known = NAMED.get(name.replace("llama31", "llama3"))
    if known is not None:
        return _config(row["model"], **known)
    if "nemotron" in name:
        raise UnknownRunError(f"{row['model']} has Mamba layers, which are not modelled")
    raise UnknownRunError(f"the shape of {row['model']} is not given")


def _shape(row: Mapping[str, str]) -> dict[str, Any]:
    """What a row says; where it is mum, 64 heads, and a network four times as wide."""
    hidden, gated = int(row["hidden"]), row["swiglu"] == "1"
    heads = int(row["heads"] or 64)
    if not row["vocab"]:
        raise UnknownRunError("vocab is not given")
    if gated and not row["ffn"]:
        raise UnknownRunError("ffn is not given")
    return {
        "layers": int(row["layers"]),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(row["kv_heads"] or heads),
        "ffn": int(row["ffn"] or 4 * hidden),
        "vocab": int(row["vocab"]),
        "gated": gated,
        # GPTs share their embeddings with the head; Megatron-Core's table counts both.
        "tied": not gated and "Core" not in row["src"],
    }


def _config(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    *,
    head_dim: int = 0,
    gated: bool = True,
    tied: bool = False,
    experts: dict[str, Any] | None = None,
    dense_layers: int = 0,
    window: int | None = None,
    latent: LatentSpec | None = None,
    qk_norm: Any = None,
) -> DecoderConfig:
    sparse = tuple(layer >= dense_layers for layer in range(layers))
    return DecoderConfig(
        family=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_positions=1 << 20,
        scores=False,
        tied_embeddings=tied,
        layer_windows=tuple(None if layer % 2 else window for layer in range(layers)),
        layer_ropes=(None,) * layers,
        norms="pre",
        norm_offset=0.0,
        norm_eps=1e-5,
        qk_norm=qk_norm,
        activation="silu" if gated else "gelu",
        qkv_bias=not gated,
        output_bias=not gated,
        mlp_bias=not gated,
        fused_projections=False,
        attention_scale=1.0,
        attention_softcap=None,
        logit_softcap=None,
        logit_multiplier=1.0,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        initializer_range=0.02,
        pad_token_id=None,
        experts=ExpertsSpec(**experts, layers=sparse) if experts else None,
        latent=latent,
        hf={},
        gated=gated,
    )
