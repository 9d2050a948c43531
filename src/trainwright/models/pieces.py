"""Pieces: where a worker's part of a weight lies in the whole one.

Tensor and expert parallelism give every worker plain parameters of a smaller shape. Their names
stay; what was cut off is noted here, for whoever fills, saves, gathers or counts them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """The box at `offsets` in a tensor of shape `whole`; its own shape is the parameter's.

    `axes` names the mesh axis that cuts each cut dimension ({0: "tp"}; {0: "ep", 1: "tp"}).
    `partial` says that each worker along tp holds a part of the gradient only, to be summed.
    """

    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    axes: tuple[tuple[int, str], ...] = ()
    partial: bool = False
    expert: bool = False

    def cuts(self, axis: str) -> bool:
        """Whether the mesh axis of that name cuts this weight."""
        return any(name == axis for _, name in self.axes)


def whole_piece(shape: tuple[int, ...], *, partial: bool = False, expert: bool = False) -> Piece:
    """The piece that is all of a tensor of that shape."""
    return Piece(tuple(shape), (0,) * len(shape), partial=partial, expert=expert)
