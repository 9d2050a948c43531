"""Muon: momentum whose matrix update is orthogonalised (Jordan et al. 2024, "Muon").

Works on plain and on sharded (DTensor) matrices. A sharded update is gathered, orthogonalised
whole on every rank, and each rank keeps its own part: the result does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# Quintic iteration whose slope at zero is as steep as stability allows (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: singular values move into about [0.7, 1.2].

    Newton–Schulz iterations in `dtype` on [rows, columns]; returns the input's dtype.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters, with Nesterov momentum and decoupled weight decay.

    The update is scaled by 0.2·√max(rows, columns), so that its size matches AdamW's and one
    learning rate serves both (Liu et al. 2025, "Muon is scalable for LLM training").
    `dtype` is the arithmetic of the orthogonalisation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, not shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])  # Nesterov's look-ahead
        if isinstance(direction, DTensor):
            whole = orthogonalise(direction.full_tensor(), self.dtype)
            # Every rank holds the whole update already: cut out the own part, send nothing.
            update: Tensor = distribute_tensor(
                whole, direction.device_mesh, direction.placements, src_data_rank=None
            )
        else:
            update = orthogonalise(direction, self.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
