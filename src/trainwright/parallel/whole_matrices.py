"""Whole matrices for Muon: the pieces that tensor parallelism made, put together again.

Muon's update is a function of a whole matrix. Shards are gathered by `optim.muon.Shards`; here the
pieces that the workers along tp have of each matrix are gathered too. Experts that are cut over ep
are whole matrices already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trainwright.comm.collectives import gather
from trainwright.models.pieces import Piece
from trainwright.optim.muon import Shards
from trainwright.parallel.mesh import Mesh


class WholePieces(Shards):
    """`optim.muon.Whole` for a model's parameters, by their pieces."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        pieces: Mapping[str, Piece],
        mesh: Mesh,
    ) -> None:
        self.pieces = {id(p): pieces[name] for name, p in parameters if name in pieces}
        self.group, self.index, self.workers = mesh.group("tp"), mesh.index("tp"), mesh.size("tp")

    def shape(self, parameter: Tensor) -> torch.Size:
        piece = self.pieces.get(id(parameter))
        return super().shape(parameter) if piece is None else torch.Size(piece.whole)

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        whole = super().whole(parameter, tensor)
        for dim in self._cuts(parameter):
            whole = gather(whole, dim, self.group)
        return whole

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        for dim in self._cuts(parameter):
            whole = whole.chunk(self.workers, dim)[self.index]
        return super().own(parameter, whole)

    def _cuts(self, parameter: Tensor) -> list[int]:
        """The dimensions that tp has cut: rows or columns, never which matrices of a stack."""
        piece = self.pieces.get(id(parameter))
        return [] if piece is None else [dim for dim, axis in piece.axes if axis == "tp"]
