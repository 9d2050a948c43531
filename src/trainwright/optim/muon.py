"""Muon: momentum whose matrix update is orthogonalised (Jordan et al. 2024, "Muon").

Works on plain matrices, on stacks of them such as a layer's experts, on replicated ones (the
replicas share the orthogonalising out) and on parts of larger ones: what is sharded or cut is
gathered, orthogonalised whole, and each worker keeps its own part. The result does not depend on
the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainwright.comm.local import local

# Quintic iteration whose slope at zero is as steep as stability allows (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Whole(Protocol):
    """How the matrices of parameters that are parts of larger ones are made whole.

    `whole` and `own` are called by all workers that share a parameter, in the same order.
    """

    def shape(self, parameter: Tensor) -> torch.Size:
        """The shape of the whole parameter, [rows, columns] or [experts, rows, columns]."""

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """`tensor`, laid out like `parameter`, with its last two dimensions whole."""

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This worker's part of what `whole` returned, as a plain tensor."""


class Shards:
    """`Whole` for plain parameters and for DTensors, which FSDP makes."""

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        return tensor.to_local() if _has_whole_matrices(tensor) else tensor.full_tensor()

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or _has_whole_matrices(parameter):
            return whole
        (chunk,) = parameter.__create_chunk_list__()
        box = zip(chunk.offsets, chunk.sizes, strict=True)
        return whole[tuple(slice(start, start + size) for start, size in box)]


def _has_whole_matrices(tensor: DTensor) -> bool:
    """Whether each worker has some of a stack's matrices, and those whole."""
    return all(
        isinstance(p, Replicate) or (p.is_shard(dim=0) and tensor.ndim == 3)
        for p in tensor.placements
    )


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: singular values move into about [0.7, 1.2].

    Newton–Schulz iterations in `dtype` on [rows, columns], or on each of [matrices, rows,
    columns]; returns the input's dtype.
    """
    a, b, c = COEFFICIENTS
    fused = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    # Normalised first: fp16 could not hold it before.
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + fused(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and stacks of them, with Nesterov momentum and decoupled weight decay.

    The update is scaled by 0.2·√max(rows, columns), so that its size matches AdamW's and one
    learning rate serves both (Liu et al. 2025, "Muon is scalable for LLM training").
    `dtype` is the arithmetic of the orthogonalisation. `replicas` is the process group whose
    workers hold the same parameters and gradients, if any: they share the orthogonalising out.
    `whole` knows the parameters that are parts of larger ones.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        replicas: dist.ProcessGroup | None = None,
        whole: Whole | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.replicas, self.layout = dtype, replicas, whole or Shards()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices, not shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group["momentum"]) for p in parameters]
            updates = self._updates(parameters, directions)
            for parameter, update in zip(parameters, updates, strict=True):
                own = local(parameter)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * 0.2 * math.sqrt(max(self.layout.shape(parameter)[-2:]))
                own.sub_(update.to(own.dtype), alpha=size)

    def _direction(self, parameter: Tensor, rate: float) -> Tensor:
        """The momentum, looked ahead by one step as Nesterov does."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - rate)
        return gradient.lerp(momentum, rate)

    def _updates(self, parameters: list[Tensor], directions: list[Tensor]) -> Iterable[Tensor]:
        """This worker's part of each parameter's update, plain."""
        if self.replicas is None:
            return map(self._orthogonalised, parameters, directions)
        # Each worker does its share; a sum with the others' zeros is exact.
        rank, size = dist.get_rank(self.replicas), dist.get_world_size(self.replicas)
        shapes = [local(direction).shape for direction in directions]
        device = local(directions[0]).device
        flat = torch.zeros(sum(s.numel() for s in shapes), dtype=self.dtype, device=device)
        places = flat.split([shape.numel() for shape in shapes])
        updates = [place.view(shape) for place, shape in zip(places, shapes, strict=True)]
        for index in range(rank, len(directions), size):
            updates[index].copy_(self._orthogonalised(parameters[index], directions[index]))
        dist.all_reduce(flat, group=self.replicas)
        return updates

    def _orthogonalised(self, parameter: Tensor, direction: Tensor) -> Tensor:
        whole = orthogonalise(self.layout.whole(parameter, direction), self.dtype)
        return self.layout.own(parameter, whole)
