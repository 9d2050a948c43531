"""Vectors that codecs are tried on, and codecs to try."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.codec import Codec
from trainwright.recipe.swarm import CodecName

NAMES: tuple[CodecName, ...] = get_args(CodecName)
SIZES = (0, 1, 2, 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 13000)


def every_codec() -> list[Codec]:
    """All that a recipe can name, top-k at three densities."""
    codecs = [build_codec(name, density=1 / 64) for name in NAMES]
    return codecs + [build_codec("top-k", density=density) for density in (1e-4, 0.3, 1.0)]


def vectors(size: int, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Vectors of a size, by what is special about them."""
    rng = np.random.default_rng([seed, size])
    normal = rng.standard_normal(size)
    biggest = float(np.finfo(np.float32).max)
    kinds = {
        "normal": normal,
        "heavy-tailed": rng.standard_t(1.5, size),
        "of many magnitudes": normal * 10.0 ** rng.uniform(-30, 30, size),
        "positive": np.abs(normal),
        "mostly zero": normal * (rng.random(size) < 0.01),
        "zero": np.zeros(size),
        "one value": np.full(size, -0.3),
        "of few values": rng.integers(-2, 3, size) * 0.25,
        "subnormal": normal * 1e-42,
        "largest": rng.choice([-biggest, biggest, 1.0], size),
        "powers of two": np.exp2(rng.integers(-9, 1, size)) * rng.choice([-1, 1], size),
    }
    for kind, values in kinds.items():
        yield kind, torch.from_numpy(values.astype(np.float32))
