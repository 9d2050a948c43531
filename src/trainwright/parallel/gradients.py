"""From every worker's share of the gradients to the whole ones, and their norm over all axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.comm.local import local
from trainwright.models.pieces import Piece
from trainwright.parallel.mesh import Mesh

Named = Iterable[tuple[str, nn.Parameter]]


@torch.no_grad()
def sum_partial(parameters: Named, pieces: Mapping[str, Piece], mesh: Mesh) -> None:
    """Sum over tp the gradients of which each worker has seen some tokens or heads only."""
    group = mesh.group("tp")
    if group is None:
        return
    gradients = [
        local(p.grad)
        for name, p in parameters
        if p.grad is not None and name in pieces and pieces[name].partial
    ]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def gradient_norm(parameters: Named, pieces: Mapping[str, Piece], mesh: Mesh) -> Tensor:
    """2-norm over all gradients of the whole model, each counted once, equal on all workers.

    Each worker adds the squares of what it holds, divided by how many workers hold the same; one
    sum over all workers makes the whole, stages and experts included.
    """
    by_copies: dict[int, list[Tensor]] = {}
    device = mesh.world.device
    for name, parameter in parameters:
        if parameter.grad is not None:
            count = copies(parameter, pieces.get(name), mesh)
            by_copies.setdefault(count, []).append(local(parameter.grad))
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32)
    total = total.to(device)
    for count, gradients in by_copies.items():
        norm = torch.nn.utils.get_total_norm(gradients)
        total += norm.to(total).square() / count
    if mesh.world.size > 1:
        dist.all_reduce(total)
    return total.sqrt().float()


def copies(parameter: Tensor, piece: Piece | None, mesh: Mesh) -> int:
    """Workers of a stage that hold the same part of a parameter."""
    workers = mesh.world.size // mesh.plan.pp
    if isinstance(parameter, DTensor):
        # Replicas of shards: the mesh's last axis is the one that shards.
        workers //= parameter.device_mesh.size(-1)
    if piece is not None:
        for axis in ("tp", "ep"):
            if piece.cuts(axis):
                workers //= mesh.size(axis)
    return workers
