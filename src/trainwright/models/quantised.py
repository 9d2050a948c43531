"""Linear layers whose frozen weight is kept in 4 or 8 bits, as QLoRA trains adapters over.

`quantise_model` puts them in place of the blocks' linear layers, on "meta" or with weights in
them; `models.quantised_files` fills what was on "meta". Names stay Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.errors import Mistake, UserError
from trainwright.kernels import int8, nf4
from trainwright.models.decoder import Decoder
from trainwright.models.fallback import FallbackModel
from trainwright.models.quantised_spec import Kind, QuantisedSpec, can_cut
from trainwright.models.weights import write_part

Device = torch.device | str | None
Shape = tuple[int, int]  # [out, in]


@dataclass(frozen=True)
class Packed:
    """A weight as a layer holds it: `weight` is its parameter, the others are buffers."""

    weight: Tensor
    scales: Tensor
    groups: Tensor | None = None
    offset: Tensor | None = None


class Format(Protocol):
    """A way to keep a weight."""

    def empty(self, shape: Shape, double: bool, device: Device) -> Packed:
        """Room for a weight of that shape; `double` quantises its scales too."""

    def pack(self, weight: Tensor | nf4.NF4, double: bool, rows: slice, columns: slice) -> Packed:
        """A part of the whole weight, with the values that it has there."""

    def linear(self, x: Tensor, packed: Packed, shape: Shape, bias: Tensor | None) -> Tensor:
        """x · weightᵀ + bias."""

    def dequantise(self, packed: Packed, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""


class NF4Format:
    """Bytes [⌈out · in / 2⌉, 1], as bitsandbytes keeps them; see `kernels.nf4`.

    A part of a weight has plain scales, for the groups of the whole one do not end where it does.
    """

    def empty(self, shape: Shape, double: bool, device: Device) -> Packed:
        values = shape[0] * shape[1]
        count = -(-values // nf4.BLOCK)
        weight = torch.empty(-(-values // 2), 1, dtype=torch.uint8, device=device)
        if not double:
            return Packed(weight, torch.empty(count, device=device))
        scales = torch.empty(count, dtype=torch.uint8, device=device)
        groups = torch.empty(-(-count // nf4.GROUP), device=device)
        return Packed(weight, scales, groups, torch.empty((), device=device))

    def pack(self, weight: Tensor | nf4.NF4, double: bool, rows: slice, columns: slice) -> Packed:
        whole = weight if isinstance(weight, nf4.NF4) else nf4.quantise(weight, double=double)
        part = (rows.stop - rows.start, columns.stop - columns.start)
        own = whole if part == whole.shape else nf4.cut(whole, rows, columns)
        return Packed(own.packed.view(-1, 1), own.scales, own.groups, own.offset)

    def linear(self, x: Tensor, packed: Packed, shape: Shape, bias: Tensor | None) -> Tensor:
        return nf4.linear(x, _nf4(packed, shape), bias)

    def dequantise(self, packed: Packed, shape: Shape, dtype: torch.dtype) -> Tensor:
        return nf4.dequantise(_nf4(packed, shape), dtype)


class Int8Format:
    """int8 [out, in] and the scales of its rows; see `kernels.int8`."""

    def empty(self, shape: Shape, double: bool, device: Device) -> Packed:
        weight = torch.empty(shape, dtype=torch.int8, device=device)
        return Packed(weight, torch.empty(shape[0], device=device))

    def pack(self, weight: Tensor | nf4.NF4, double: bool, rows: slice, columns: slice) -> Packed:
        plain = nf4.dequantise(weight) if isinstance(weight, nf4.NF4) else weight
        whole = int8.quantise(plain)
        return Packed(whole.values[rows, columns].contiguous(), whole.scales[rows].clone())

    def linear(self, x: Tensor, packed: Packed, shape: Shape, bias: Tensor | None) -> Tensor:
        return int8.linear(x, int8.Int8(packed.weight, packed.scales), bias)

    def dequantise(self, packed: Packed, shape: Shape, dtype: torch.dtype) -> Tensor:
        return int8.dequantise(int8.Int8(packed.weight, packed.scales), dtype)


def _nf4(packed: Packed, shape: Shape) -> nf4.NF4:
    return nf4.NF4(packed.weight.view(-1), packed.scales, shape, packed.groups, packed.offset)


NOT_PACKED = "skip the layer, or use another copy of the model"  # what a user can do

FORMATS: dict[Kind, Format] = {"nf4": NF4Format(), "int8": Int8Format()}


class QuantisedLinear(nn.Module):
    """Stands where a frozen `nn.Linear` stood, with its bias, a parameter or None.

    `weight` is a parameter without a gradient, so that FSDP2 shards it (whole numbers are gathered
    as they are, whatever type others are narrowed to) and whoever counts or moves parameters sees
    it; scales are buffers, a thirtieth of its size, whole on every worker. A worker may have a part
    of the whole weight; it holds the values of the whole one.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scales: Tensor
    groups: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        *,
        kind: Kind = "nf4",
        double_quant: bool = True,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.double_quant = kind, double_quant
        self.whole = (out_features, in_features)
        self.rows, self.columns = slice(0, out_features), slice(0, in_features)
        self.register_parameter("bias", bias)
        self._allocate(device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to x · weightᵀ + bias [..., out], in autocast's type or else in x's."""
        return self.base_product(x, self.bias)

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] to x · weightᵀ + bias, for whoever adds the layer's own bias elsewhere."""
        packed = self._packed(self.weight)
        return FORMATS[self.kind].linear(x, packed, self.shape, bias)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this worker multiplies by, [out, in].

        Where it is sharded its shards are gathered, and every worker must ask.
        """
        weight: Tensor = self.weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return FORMATS[self.kind].dequantise(self._packed(whole), self.shape, dtype)

    @torch.no_grad()
    def take(self, weight: Tensor | nf4.NF4) -> None:
        """Quantise a whole weight in fp32, bf16 or fp16, or take one in NF4, and keep this part.

        Parts are taken of the whole one, so that values do not depend on the layout. Raises
        ValueError, to be read after a name, for another shape and values that are not finite.
        """
        if tuple(weight.shape) != self.whole:
            raise ValueError(f"is {list(weight.shape)}, not {list(self.whole)}")
        if isinstance(weight, Tensor):  # not to where an offloaded weight rests
            weight = weight.to(self.scales.device)
        packed = FORMATS[self.kind].pack(weight, self.double_quant, self.rows, self.columns)
        write_part(self.weight, packed.weight.__getitem__)
        for name in ("scales", "groups", "offset"):
            buffer = getattr(packed, name)
            setattr(self, name, None if buffer is None else buffer.to(self.scales.device))

    def cut(self, dim: int, index: int, workers: int) -> None:
        """Leave of a layer on "meta" the `index`-th of `workers` equal parts of its weight.

        The bias is the caller's to cut. Raises ValueError where a part would cut a block.
        """
        if not can_cut(self.shape, self.kind, dim, workers):
            raise ValueError(f"{self.shape} has no {workers} equal parts of whole blocks of 64")
        size = self.shape[dim] // workers
        first = (self.rows, self.columns)[dim].start + index * size
        if dim == 0:
            self.rows, self.out_features = slice(first, first + size), size
        else:
            self.columns, self.in_features = slice(first, first + size), size
        self._allocate("meta")

    @property
    def shape(self) -> Shape:
        """[out, in] of this worker's part."""
        return self.out_features, self.in_features

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"

    def _packed(self, weight: Tensor) -> Packed:
        return Packed(weight, self.scales, self.groups, self.offset)

    def _allocate(self, device: Device) -> None:
        double = self.double_quant and self.shape == self.whole
        empty = FORMATS[self.kind].empty(self.shape, double, device)
        self.weight = nn.Parameter(empty.weight, requires_grad=False)
        for name in ("scales", "groups", "offset"):
            self.register_buffer(name, getattr(empty, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """What `to`, `cuda`, `half`, … go through: no call that narrows a model rounds scales."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def quantise_model(model: Decoder | FallbackModel, spec: QuantisedSpec) -> list[str]:
    """Put quantised layers in place of the blocks' linear layers; returns their names.

    A layer that has values is quantised now; one on "meta" is filled by `load_quantised`. The
    output head, embeddings, norms, routers and stacked experts (no linear layers) stay as they are.
    Raises UserError for a weight that cannot be quantised.
    """
    inside = {id(module) for block in model.blocks for module in block.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) in inside and spec.takes(name)
    }
    for name in list(found):
        parent, _, own = name.rpartition(".")
        try:  # taken out of `found` too, so that a weight goes before the next one is quantised
            layer = quantised(found.pop(name), spec)
        except ValueError as error:
            raise UserError(Mistake(f"{name}.weight {error}", NOT_PACKED)) from error
        setattr(model.get_submodule(parent), own, layer)
    return [name for name, m in model.named_modules() if isinstance(m, QuantisedLinear)]


def quantised(linear: nn.Linear, spec: QuantisedSpec) -> QuantisedLinear:
    """The layer that takes `linear`'s place, with its bias itself and its weight quantised."""
    layer = QuantisedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias,
        kind=spec.kind,
        double_quant=spec.double_quant,
        device=linear.weight.device,
    )
    if not linear.weight.is_meta:
        layer.take(linear.weight)
    return layer
