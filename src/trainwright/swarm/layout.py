"""All trained weights as one flat vector: which tensor lies where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in a vector, in its order; the order is the manifest's."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors, by name."""
        return cls(tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors)))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor's values are."""
        found, start = {}, 0
        for name, shape in self.shapes:
            stop = start + math.prod(shape)
            found[name] = slice(start, stop)
            start = stop
        return found

    @property
    def count(self) -> int:
        """Values in all."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One fp32 vector [count] on the CPU, a copy."""
        found = torch.empty(self.count)
        for name, place in self.slices.items():
            found[place] = tensors[name].detach().reshape(-1).to("cpu", torch.float32)
        return found

    def unflatten(self, values: Tensor) -> dict[str, Tensor]:
        """Views of a vector [count], each in its tensor's shape."""
        places = self.slices
        return {name: values[places[name]].view(shape) for name, shape in self.shapes}

    def part(self, names: Iterable[str]) -> tuple[slice, ...]:
        """The slices of these tensors, in the vector's order, neighbours joined."""
        wanted, joined = set(names), list[slice]()
        for name, place in self.slices.items():
            if name not in wanted:
                continue
            if joined and joined[-1].stop == place.start:
                place = slice(joined.pop().start, place.stop)
            joined.append(place)
        return tuple(joined)


def take(values: Tensor, slices: Iterable[slice]) -> Tensor:
    """The values of those slices, one after the other, a copy."""
    return torch.cat([values[each] for each in slices])


def put(values: Tensor, slices: Iterable[slice], part: Tensor) -> None:
    """Write what `take` took back in place."""
    start = 0
    for each in slices:
        size = each.stop - each.start
        values[each] = part[start : start + size]
        start += size
