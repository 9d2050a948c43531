"""Codecs by the recipe's names."""

from __future__ import annotations

from collections.abc import Callable

from trainwright.comm.codecs.centroids import Centroids
from trainwright.comm.codecs.codec import Codec
from trainwright.comm.codecs.dense import Dense
from trainwright.comm.codecs.e3m0 import E3M0
from trainwright.comm.codecs.index_coding import Rice, TwelveBits
from trainwright.comm.codecs.int8 import Int8
from trainwright.comm.codecs.top_k import TopK
from trainwright.recipe.swarm import CodecName

# Kept values share tables so widely that 12 + 2 bits a value are all that counts: 256 chunks.
FEW_TABLES = 16384

_MADE: dict[CodecName, Callable[[float], Codec]] = {
    "fp32": lambda density: Dense("fp32"),
    "bf16": lambda density: Dense("bf16"),
    "int8": lambda density: Int8(),
    "e3m0": lambda density: E3M0(),
    "2bit": lambda density: Centroids(2),
    "1bit": lambda density: Centroids(1),
    "top-k": lambda density: TopK("top-k", density, Rice(), Centroids(2)),
    "top-k-12bit": lambda density: TopK(
        "top-k-12bit", density, TwelveBits(), Centroids(2, FEW_TABLES)
    ),
}


def build_codec(name: CodecName, *, density: float) -> Codec:
    """The codec of this name; `density` is the share of values that `top-k` codecs keep."""
    return _MADE[name](density)
