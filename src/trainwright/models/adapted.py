"""What every layer with adapters has: their tensors by name, which are in use, what DoRA scales by.

A layer becomes an adapted one where it stands: its class changes, its weights, hooks and names do
not. The adapter that is trained adds `lora_A.weight`, `lora_B.weight` and so on to the layer's own
tensors; others lie in `beside.<name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainwright.kernels.dropout import dropout
from trainwright.models.adapter_spec import BESIDE, TRAINED, LayerAdapter

_keys: Tensor | None = None  # of the tokens that the layers now see


@contextmanager
def dropping(keys: Tensor | None) -> Iterator[None]:
    """Adapters within drop inputs by these keys of the tokens, int64 [batch, sequence].

    Made by `kernels.dropout.layer_keys`; None drops nothing, as outside. To be opened inside what
    is recomputed, since a recomputation happens when the next tokens may be under way.
    """
    global _keys
    previous, _keys = _keys, keys
    try:
        yield
    finally:
        _keys = previous


class Factor(nn.Module):
    """One low-rank matrix. No nn.Linear, so that nothing that looks for those finds it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Update(NamedTuple):
    """What is added to a weight: scale · B A, A [rank, in] and B [out, rank].

    `factor` [out], where there is one, multiplies the sum of weight and update (DoRA).
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    factor: Tensor | None = None


class Adapted(nn.Module):
    """A layer with adapters, whose weight W maps inputs to outputs."""

    adapters: dict[str, LayerAdapter]
    active: tuple[str, ...]  # which of them are in use
    merged: list[Update] | None  # what has been added to the weight
    place: int  # tells the layers of a block apart, for dropout
    beside: nn.ModuleDict
    # Adds up what workers have of each output's squares, where each has some of the inputs.
    sum_squares: Callable[[Tensor], Tensor] | None

    def slot(self, name: str) -> nn.Module:
        """The module that holds an adapter's tensors."""
        return self if name == TRAINED else self.beside[name]

    def add(self, name: str, adapter: LayerAdapter) -> None:
        """Make room for an adapter's tensors, on the weight's device and without values.

        They are fp32 at least: the optimizer adds small steps to them, whatever the base is in.
        """
        slot = self if name == TRAINED else nn.Module()
        self._make_factors(slot, adapter)
        if adapter.dora:
            slot.register_parameter("lora_magnitude_vector", self.parameter(self.sides()[0]))
        if slot is not self:
            self.beside[name] = slot.requires_grad_(False)
        self.adapters[name] = adapter
        self.active = (*self.active, name)

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter without values, where the weight is."""
        home = next(chain(self.parameters(recurse=False), self.buffers(recurse=False)))
        wide = torch.float64 if home.dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.empty(shape, dtype=wide, device=home.device))

    def updates(self, names: Iterable[str] | None = None) -> list[Update]:
        """What is to be added to the weight that is here, by the active adapters or these."""
        if self.merged is not None:
            return []
        names = self.active if names is None else tuple(names)
        result = []
        for name in names:
            adapter, factors = self.adapters[name], self.factors(name)
            length = self._magnitude_factor(name) if adapter.dora else None
            result.append(Update(*factors, adapter.scale, adapter.dropout, length))
        trained = self.adapters.get(TRAINED)
        if trained is not None and trained.init == "pissa" and TRAINED not in names:
            # The weight lacks what the adapter started from.
            result.append(Update(*self.factors(TRAINED, "start"), trained.scale))
        return result

    def updated(self, weight: Tensor, names: Iterable[str] | None = None) -> Tensor:
        """`weight`, laid out as the layer's, with the `updates` added, in its type."""
        total = weight
        for A, B, scale, _, factor in self.updates(names):
            A, B = A.to(weight.dtype), B.to(weight.dtype)
            if factor is None:
                total = self._plus_product(total, A, B, scale)
            else:
                changed = self._plus_product(weight, A, B, scale)
                total = total - weight + self._by_output(factor.to(weight.dtype)) * changed
        return total

    def dropped(self, x: Tensor, share: float) -> Tensor:
        """An adapter's inputs [batch, sequence, in], some of them zero where tokens have keys."""
        if _keys is None or not share:
            return x
        return dropout(x, _keys, self.place, share)

    def reverted(self, weight: Tensor, updates: Iterable[Update]) -> Tensor:
        """What `updated` made `weight` of, with these updates, to rounding."""
        share: Tensor | float = 1.0
        for A, B, scale, _, factor in updates:
            if factor is not None:
                share = share + self._by_output(factor.to(weight.dtype)) - 1
                B = factor.unsqueeze(1) * B
            weight = self._plus_product(weight, A.to(weight.dtype), B.to(weight.dtype), -scale)
        return weight / share

    def _magnitude_factor(self, name: str) -> Tensor:
        """What DoRA multiplies each output by: magnitude / ‖W + scale · B A‖, [out].

        The length takes no part in the backward pass (section 4.3 of arXiv:2402.09353).
        """
        magnitude: Tensor = self.slot(name).lora_magnitude_vector  # type: ignore[assignment]
        with torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
            lengths = self._lengths(*self.factors(name), self.adapters[name].scale)
        return self.own_outputs(magnitude) / lengths

    def _lengths(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """‖W + scale · B A‖ of each output, [out], without making the sum.

        ‖w + s b A‖² = ‖w‖² + 2 s (w Aᵀ) · b + s² (b A Aᵀ) · b, with rows w of W and b of B.
        """
        b = self.own_outputs(b)
        squares = self.weight_lengths(a.dtype).square()
        squares = squares + 2 * scale * (self._weight_times(a) * b).sum(1)
        squares = squares + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        if self.sum_squares is not None:
            squares = self.sum_squares(squares)
        # Rounding may leave next to nothing on either side of zero; a row of zeros stays one.
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

    def own_outputs(self, tensor: Tensor) -> Tensor:
        """Of what there is for each output [out, …], that for the outputs made here."""
        return tensor

    def factors(self, name: str, which: str = "lora") -> tuple[Tensor, Tensor]:
        """A and B of an adapter; with "start", those that PiSSA took out of the weight."""
        raise NotImplementedError

    def sides(self) -> tuple[int, int]:
        """How many outputs and inputs there are."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The weight as it is here, without adapters that are not merged."""
        raise NotImplementedError

    def weight_lengths(self, dtype: torch.dtype) -> Tensor:
        """‖W‖ of each output, [out]."""
        raise NotImplementedError

    def _make_factors(self, slot: nn.Module, adapter: LayerAdapter) -> None:
        """Put an adapter's matrices into its slot."""
        raise NotImplementedError

    def _weight_times(self, a: Tensor) -> Tensor:
        """W aᵀ [out, rank], in the type of a."""
        raise NotImplementedError

    def _plus_product(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """weight + scale · b a, laid out as the weight is."""
        raise NotImplementedError

    def _by_output(self, values: Tensor) -> Tensor:
        """Values [out] in the shape in which they multiply the weight."""
        raise NotImplementedError


def become(module: nn.Module, kind: type[Adapted], place: int) -> Adapted:
    """Turn a layer into an adapted one of `kind`, without any adapter yet."""
    module.__class__ = kind
    assert isinstance(module, Adapted)
    module.adapters, module.active, module.merged = {}, (), None
    module.place, module.sum_squares = place, None
    module.add_module(BESIDE, nn.ModuleDict())
    return module
