"""The state of every random number generator of this process, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """`torch`, `numpy`, `python`, and `cuda` (the current device) where there is one.

    torch's own states are uint8; the Mersenne Twisters of numpy and Python are int64 [627]: 624
    words, the position, whether a Gaussian waits to be handed out, and its bits.
    """
    mersenne: Any = np.random.get_state(legacy=False)
    words, position = mersenne["state"]["key"], mersenne["state"]["pos"]
    _, python_words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _packed(
            [*words.tolist(), position], mersenne["gauss"] if mersenne["has_gauss"] else None
        ),
        "python": _packed(list(python_words), python_gauss),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Put the generators named in `states` back; a state for a device not here is left out."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        *words, position, has_gauss, bits = states["numpy"].tolist()
        keys = np.array(words, dtype=np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, _float(bits)))
    if "python" in states:
        *words, has_gauss, bits = states["python"].tolist()
        random.setstate((3, tuple(words), _float(bits) if has_gauss else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python; `seed` is at most 63 bits."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _packed(words: list[int], gauss: float | None) -> Tensor:
    bits = int(np.float64(gauss or 0.0).view(np.int64))
    return torch.tensor([*words, int(gauss is not None), bits], dtype=torch.int64)


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
