"""All trained weights, or their gradients, as one vector on the first worker, and back.

For outer loops, which know nothing of how a model is spread. Tensors go one by one, so that no
worker but the first ever holds more than one of them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.comm.local import local
from trainwright.parallel.spread import SpreadModel
from trainwright.swarm.layout import Layout
from trainwright.training.reference import give_back

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Spot:
    """Where this worker's part of a parameter lies in the whole one, and whether it speaks for it:
    of several workers with the same part, the first does.
    """

    parameter: nn.Parameter
    box: Box
    speaks: bool


class Gathering:
    """Collects what a spread model's workers hold of its trained weights. All calls are collective.

    `layout` has their whole shapes, by name in the order of names.
    """

    def __init__(self, spread: SpreadModel) -> None:
        self.world, self.pieces = spread.mesh.world, spread.pieces
        self.spread = spread
        give_back(spread)
        held: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
        for name, parameter in spread.unique_parameters():
            if parameter.requires_grad:
                whole, offsets = self._place(name, parameter)
                held[name] = (whole, offsets, tuple(local(parameter).shape))
        everyone = self.world.gather(held)
        shapes = {name: entry[0] for each in everyone for name, entry in each.items()}
        self.layout = Layout(tuple(sorted(shapes.items())))
        taken = {
            (name, entry) for each in everyone[: self.world.rank] for name, entry in each.items()
        }
        self.spots = {
            name: Spot(parameter, self._box(*held[name][1:]), (name, held[name]) not in taken)
            for name, parameter in spread.unique_parameters()
            if name in held
        }

    def weights(self) -> Tensor | None:
        """fp32 [count] on the first worker's CPU; None on the others."""
        return self._collect(lambda spot: spot.parameter)

    def gradients(self, held: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
        """The same of whole gradients, by parameter; one that has none has zeros."""
        return self._collect(lambda spot: held.get(spot.parameter))

    @torch.no_grad()
    def _collect(self, of: Callable[[Spot], Tensor | None]) -> Tensor | None:
        give_back(self.spread)
        found = torch.empty(self.layout.count) if self.world.is_first else None
        for name, shape in self.layout.shapes:
            whole = torch.zeros(shape, device=self.world.device)
            spot = self.spots.get(name)
            if spot is not None and spot.speaks and (value := of(spot)) is not None:
                whole[spot.box] = local(value).to(whole.dtype)
            if self.world.size > 1:
                dist.reduce(whole, 0)  # everyone else's part is zero: nothing is rounded
            if found is not None:
                found[self.layout.slices[name]] = whole.view(-1).cpu()
        return found

    @torch.no_grad()
    def put_back(self, weights: Tensor | None) -> None:
        """Give every worker its parts of `weights`, fp32 [count], which the first one has."""
        # Behind a forward pass parameters may be whole copies, which the next step throws away.
        give_back(self.spread)
        parts = dict[str, list[nn.Parameter]]()
        for name, parameter in self.spread.named_parameters():  # tied copies too
            parts.setdefault(name, []).append(parameter)
        for name, shape in self.layout.shapes:
            if weights is not None:
                whole = weights[self.layout.slices[name]].view(shape).to(self.world.device)
            else:
                whole = torch.empty(shape, device=self.world.device)
            if self.world.size > 1:
                dist.broadcast(whole, 0)
            for parameter in parts.get(name, ()):
                offsets, size = self._place(name, parameter)[1], local(parameter).shape
                local(parameter.detach()).copy_(whole[self._box(offsets, tuple(size))])

    def _place(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The whole tensor's shape, and where this worker's part of it begins."""
        piece = self.pieces.get(name)
        whole = piece.whole if piece is not None else tuple(parameter.shape)
        offsets = piece.offsets if piece is not None else (0,) * parameter.ndim
        if isinstance(parameter, DTensor):
            (chunk,) = parameter.__create_chunk_list__()
            offsets = tuple(a + b for a, b in zip(offsets, chunk.offsets, strict=True))
        return tuple(whole), tuple(offsets)

    @staticmethod
    def _box(offsets: tuple[int, ...], size: tuple[int, ...]) -> Box:
        return tuple(slice(a, a + n) for a, n in zip(offsets, size, strict=True))
