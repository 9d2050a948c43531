"""Rotary embeddings as a model's config describes them, read into one torch-free record.

Both spellings are understood: transformers 4 (`rope_theta`, `rope_scaling`) and transformers 5
(`rope_parameters`). The frequencies themselves are computed in `models.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.errors import Mistake
from trainwright.models.config_values import LIST, NUMBER

# Keys that a kind cannot do without, besides its base.
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# Keys whose values are numbers, where they are given.
NUMBERS = (
    "rope_theta",
    "factor",
    "attention_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
FACTORS = ("short_factor", "long_factor")  # a number for each pair of channels


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding. Equal specs share their cos and sin tables.

    `dim` counts the channels of a head that turn (the first ones); `cos_scale` multiplies cos and
    sin ("attention factor"); lengths are in tokens.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    original_max_positions: int
    factor: float = 1.0
    cos_scale: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the document being read."""
        return self.kind in ("dynamic", "longrope")


def read_rope(
    parameters: Mapping[str, Any],
    *,
    key: str,
    head_dim: int | None,
    max_positions: int,
    theta: float,
    partial: float = 1.0,
    original_max_positions: int | None = None,
    kinds: tuple[str, ...] = tuple(REQUIRED),
) -> tuple[RopeSpec | None, list[Mistake]]:
    """The spec that `parameters` (a `rope_parameters` or `rope_scaling` mapping) describes.

    `theta`, `partial` (share of a head that turns) and `original_max_positions` stand in where the
    mapping leaves them out; a `head_dim` of None is unknown, and what hangs on it is not checked;
    `kinds` are those that the family allows; `key` is the config key to name in mistakes. Returns
    no spec where there are mistakes.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in kinds:
        fix = f"one of {', '.join(kinds)}"
        return None, [Mistake(f"unknown rotary embedding type {kind!r}", fix, f"{key}.rope_type")]

    mistakes = [
        Mistake(f"rotary embedding type {kind!r} needs `{name}`", f"add `{name}`", f"{key}.{name}")
        for name in REQUIRED[kind]
        if parameters.get(name) is None
    ]
    for name in NUMBERS:
        value = parameters.get(name)
        if value is not None and not NUMBER.fits(value):
            mistakes.append(Mistake(f"`{name}` is {value!r}", NUMBER.name, f"{key}.{name}"))
    for name in FACTORS:
        value = parameters.get(name)
        if value is not None and not (LIST.fits(value) and all(map(NUMBER.fits, value))):
            mistakes.append(Mistake(f"`{name}` is {value!r}", "a list of numbers", f"{key}.{name}"))
    if mistakes:
        return None, mistakes
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        what = "`high_freq_factor` is not above `low_freq_factor`"
        mistakes.append(Mistake(what, "4 and 1 in Llama 3", f"{key}.high_freq_factor"))
    share = parameters.get("partial_rotary_factor", partial)
    dim = int(head_dim * share) if head_dim is not None else 0
    if head_dim is not None and (dim < 2 or dim % 2):
        mistakes.append(
            Mistake(
                f"rotary embeddings turn pairs of channels, but {dim} of a head's {head_dim} turn",
                "an even head_dim, and a partial_rotary_factor that leaves it even",
                "model.config.head_dim",
            )
        )
    if kind == "longrope" and head_dim is not None:
        for name in FACTORS:
            found = len(parameters.get(name) or ())
            if found not in (0, dim // 2):
                what = f"`{name}` has {found} numbers, one for each of {dim // 2} pairs is needed"
                mistakes.append(Mistake(what, f"give {dim // 2} numbers", f"{key}.{name}"))
    if mistakes:
        return None, mistakes

    original = (
        original_max_positions
        or parameters.get("original_max_position_embeddings")
        or max_positions
    )
    stretch = parameters.get("factor") or max_positions / original
    spec = RopeSpec(
        kind=kind,
        theta=float(parameters.get("rope_theta") or theta),
        dim=dim,
        max_positions=max_positions,
        original_max_positions=original,
        factor=float(stretch),
        cos_scale=_cos_scale(kind, parameters, stretch, original),
        low_freq_factor=float(parameters.get("low_freq_factor") or 1.0),
        high_freq_factor=float(parameters.get("high_freq_factor") or 4.0),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        short_factor=tuple(map(float, parameters.get("short_factor") or ())),
        long_factor=tuple(map(float, parameters.get("long_factor") or ())),
    )
    return spec, []


def _cos_scale(kind: str, parameters: Mapping[str, Any], factor: float, original: int) -> float:
    """YaRN's and LongRoPE's correction of the attention's temperature for a stretched context.

    YaRN (arXiv:2309.00071, eq. 22) with DeepSeek's `mscale` pair; LongRoPE (arXiv:2402.13753).
    """
    if kind not in ("yarn", "longrope"):
        return 1.0
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
