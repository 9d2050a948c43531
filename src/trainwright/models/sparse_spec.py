"""Mixtures of experts and latent attention as a model's config describes them, free of torch.

`ExpertsSpec` and `LatentSpec` are what `models.moe` and `models.latent_attention` are built from,
and what the planner counts; `read_experts` and `read_latent` read them by a family's row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainwright.models.family_specs import Get, Sparse

Refuse = Callable[[str, str, str], None]  # of a key: what is wrong, and the fix
STACKED = ("gate_proj", "up_proj", "down_proj")  # an expert's matrices, stacked over experts


@dataclass(frozen=True)
class ExpertsSpec:
    """The mixture of experts that takes the place of the feed-forward network in some layers.

    Each token goes to `per_token` of `count` experts, all of them gated networks of `width`; a
    shared expert of `shared_width` (0: none) sees every token besides.
    """

    count: int
    per_token: int
    width: int
    layers: tuple[bool, ...]  # which layers have experts; the others have a plain network
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True  # a token's weights are divided by their sum
    scaling: float = 1.0  # and then multiplied by this
    groups: int = 1  # of neighbouring experts; a token's experts lie in `groups_per_token` of them
    groups_per_token: int = 1
    corrected: bool = False  # a bias, moved against the load, is added where experts are chosen
    shared_width: int = 0
    shared_gate: bool = False  # a sigmoid gate on the shared expert
    balance_loss: float = 0.0  # the coefficient that the model's own config gives
    module_on_disk: str = "mlp"  # the layer's name in files, and those of an expert's matrices
    names_on_disk: tuple[str, str, str] = STACKED


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in channels.

    Keys and values of all heads are made from one latent vector of `rank` channels a token, and
    from `rope_dim` channels that turn and that all heads share; queries likewise from one of
    `query_rank`, or from the stream itself where that is None.
    """

    query_rank: int | None
    rank: int
    plain_dim: int  # of a query or key head, without position
    rope_dim: int  # of a query or key head, turned by position
    value_dim: int
    interleaved: bool  # channel 2i turns with 2i + 1, not with i + rope_dim/2


def read_experts(
    sparse: Sparse, get: Get, layers: int, sound: Callable[..., bool], refuse: Refuse
) -> ExpertsSpec | None:
    """The experts of a config; None where no layer has any.

    Mistakes go to `refuse`; `sound` says of keys that they have none so far.
    """
    count, per_token = get(sparse.count), get("num_experts_per_tok")
    groups, chosen = get("n_group") or 1, get("topk_group") or 1
    inside = chosen * (count // groups)
    if not sound(sparse.count, "num_experts_per_tok", "n_group", "topk_group"):
        pass
    elif per_token > count:
        what = f"is {per_token}, but there are {count} experts"
        refuse("num_experts_per_tok", what, f"at most {count}")
    elif count % groups or (groups > 1 and count < 2 * groups):
        what = f"is {groups}, which does not cut {count} experts into groups of two or more"
        refuse("n_group", what, "a divisor, at most half of them")
    elif chosen > groups:
        refuse("topk_group", f"is {chosen}, but there are {groups} groups", f"at most {groups}")
    elif per_token > inside:
        what = f"is {per_token}, but {chosen} of the groups hold {inside} experts"
        refuse("num_experts_per_tok", what, "fewer experts a token, or more groups")
    which = tuple(not sparse.dense(layer, get) for layer in range(layers))
    if not any(which):
        return None
    return ExpertsSpec(
        count=count,
        per_token=per_token,
        width=get(sparse.width),
        layers=which,
        scores=sparse.scores,
        normalised=sparse.always_normalised or bool(get("norm_topk_prob")),
        scaling=float(get("routed_scaling_factor") or 1.0),
        groups=groups,
        groups_per_token=chosen,
        corrected=sparse.corrected,
        shared_width=sparse.shared_width(get),
        shared_gate=sparse.shared_gate,
        balance_loss=float(get("router_aux_loss_coef") or 0.0),
        module_on_disk=sparse.module_on_disk,
        names_on_disk=sparse.names_on_disk,
    )


def read_latent(get: Get, refuse: Refuse) -> LatentSpec:
    """The latent attention of a config. Mistakes go to `refuse`."""
    rope_dim = get("qk_rope_head_dim")
    if rope_dim % 2:
        refuse("qk_rope_head_dim", f"is {rope_dim}, but channels turn in pairs", "an even number")
    return LatentSpec(
        query_rank=get("q_lora_rank"),
        rank=get("kv_lora_rank"),
        plain_dim=get("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=get("v_head_dim"),
        interleaved=bool(get("rope_interleave")),
    )


def latent_scale(latent: LatentSpec, rope: Mapping[str, Any]) -> float:
    """What scores are multiplied by: 1/√(head width), sharpened for a context that YaRN stretched.

    The sharpening is DeepSeek-V2's `mscale` squared (its appendix B.2), of `mscale_all_dim`.
    """
    scale = (latent.plain_dim + latent.rope_dim) ** -0.5
    kind = rope.get("rope_type") or rope.get("type") or "default"
    mscale, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
    if kind == "default" or not mscale or factor <= 1:
        return scale
    return scale * (0.1 * mscale * math.log(factor) + 1) ** 2
