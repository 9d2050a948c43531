"""What the values of a Hugging Face config's keys may be, in words for the user. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
NOT_NEGATIVE = Kind("a number ≥ 0", lambda value: _is_number(value) and value >= 0)
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
    "clip_qkv": NUMBER,
    "eos_token_id": ANY,
    "final_logit_softcapping": NUMBER,
    "first_k_dense_replace": POSITION,
    "head_dim": COUNT,
    "hidden_act": ANY,  # checked against the activations that there are
    "hidden_activation": ANY,
    "layer_types": LIST,
    "max_window_layers": POSITION,
    "mlp_only_layers": LIST,
    "no_rope_layers": LIST,
    "num_key_value_heads": COUNT,
    "num_nextn_predict_layers": POSITION,
    "pad_token_id": WHOLE,
    "q_lora_rank": COUNT,
    "query_pre_attn_scalar": NUMBER,
    "resid_pdrop": SHARE,
    "rope_parameters": MAPPING,
    "rope_scaling": MAPPING,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "router_jitter_noise": NOT_NEGATIVE,
    "sliding_window": COUNT,
    "use_bidirectional_attention": FLAG,
}


# Keys where null says something, rather than leaving the default.
NULLABLE = frozenset(
    {
        "attn_logit_softcapping",
        "clip_qkv",
        "final_logit_softcapping",
        "head_dim",
        "num_key_value_heads",
        "pad_token_id",
        "q_lora_rank",
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
