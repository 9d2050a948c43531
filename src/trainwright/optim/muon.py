"""Muon: momentum whose matrix update is orthogonalised (Jordan et al. 2024, "Muon").

Works on plain matrices, on replicated ones (the replicas share the orthogonalising out) and on
sharded ones (DTensor: gathered, orthogonalised whole on every rank, each keeps its own part): the
result does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
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
    x = matrix.mT if tall else matrix
    x = (x / (x.norm() + 1e-12)).to(dtype)  # normalised first: fp16 could not hold it before
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters, with Nesterov momentum and decoupled weight decay.

    The update is scaled by 0.2·√max(rows, columns), so that its size matches AdamW's and one
    learning rate serves both (Liu et al. 2025, "Muon is scalable for LLM training").
    `dtype` is the arithmetic of the orthogonalisation. `replicas` is the process group whose
    workers hold the same parameters and gradients, if any: they share the orthogonalising out.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.replicas = dtype, replicas
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, not shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group["momentum"]) for p in parameters]
            for parameter, update in zip(parameters, self._updates(directions), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
                parameter.sub_(update.to(parameter.dtype), alpha=size)

    def _direction(self, parameter: Tensor, rate: float) -> Tensor:
        """The momentum, looked ahead by one step as Nesterov does."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - rate)
        return gradient.lerp(momentum, rate)

    def _updates(self, directions: list[Tensor]) -> list[Tensor]:
        if self.replicas is None:
            return [self._orthogonalised(direction) for direction in directions]
        # Each worker does its share; a sum with the others' zeros is exact.
        rank, size = dist.get_rank(self.replicas), dist.get_world_size(self.replicas)
        shapes = [direction.shape for direction in directions]
        flat = directions[0].new_zeros(sum(map(torch.Size.numel, shapes)), dtype=self.dtype)
        places = flat.split([shape.numel() for shape in shapes])
        updates = [place.view(shape) for place, shape in zip(places, shapes, strict=True)]
        for index in range(rank, len(directions), size):
            updates[index].copy_(orthogonalise(directions[index], self.dtype))
        dist.all_reduce(flat, group=self.replicas)
        return updates

    def _orthogonalised(self, direction: Tensor) -> Tensor:
        if not isinstance(direction, DTensor):
            return orthogonalise(direction, self.dtype)
        whole = orthogonalise(direction.full_tensor(), self.dtype)
        # Every rank holds the whole update already: cut out the own part, send nothing.
        return distribute_tensor(
            whole, direction.device_mesh, direction.placements, src_data_rank=None
        )
