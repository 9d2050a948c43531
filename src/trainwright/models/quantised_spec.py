"""Which layers of a frozen base are kept in 4 or 8 bits, and what they take. Torch-free."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["nf4", "int8"]

_BLOCK, _GROUP = 64, 256  # as in kernels.nf4: values to a scale, scales to a scale of theirs


@dataclass(frozen=True)
class QuantisedSpec:
    """How the linear layers of a model's blocks are kept.

    kind "nf4" (kernels.nf4), whose scales `double_quant` quantises too, or "int8"
    (kernels.int8). Layers that `skip` names stay as they are: by the end of their name
    ("down_proj", "layers.0.mlp.down_proj") or a regular expression for all of it.
    """

    kind: Kind = "nf4"
    double_quant: bool = True
    skip: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether the linear layer of that name is quantised.

        Routers never are: small errors change which experts they choose.
        """
        if name.endswith(("gate", "router")):
            return False
        return not any(
            f".{name}".endswith(f".{pattern}") or re.fullmatch(pattern, name)
            for pattern in self.skip
        )


def quantised_bytes(shape: tuple[int, int], kind: Kind, double_quant: bool = True) -> int:
    """What a weight [out, in] takes in memory, with its scales.

    A part that tensor parallelism cuts from NF4 has plain scales: `double_quant` False.
    """
    values = math.prod(shape)
    if kind == "int8":
        return values + 4 * shape[0]
    scales = -(-values // _BLOCK)
    for_scales = scales + 4 * -(-scales // _GROUP) + 4 if double_quant else 4 * scales
    return -(-values // 2) + for_scales


def can_cut(shape: tuple[int, int], kind: Kind, dim: int, workers: int) -> bool:
    """Whether a weight [out, in] can be cut into equal parts along `dim`, no block in two."""
    if shape[dim] % workers:
        return False
    if kind == "int8":
        return True
    part = shape[dim] // workers
    return (part * shape[1] if dim == 0 else part) % _BLOCK == 0
