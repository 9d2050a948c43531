"""Weights of a model with quantised layers: from full ones, from what bitsandbytes wrote, or new.

Each tensor is read, quantised and let go before the next one is read: no more than one is ever
there in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainwright.errors import Mistake, UserError
from trainwright.kernels.nf4 import NF4
from trainwright.kernels.nf4_files import PARTS, STATE, from_bitsandbytes
from trainwright.models.decoder import Decoder
from trainwright.models.disk_names import is_stacked
from trainwright.models.pieces import Piece
from trainwright.models.quantised import NOT_PACKED, QuantisedLinear
from trainwright.models.safetensors_files import find_tensors, weight_files
from trainwright.models.weights import (
    beyond_the_model,
    drawn,
    fill_new_head,
    initialise,
    model_names_on_disk,
    named_tensors,
    normal,
    write_part,
)

Shapes = dict[str, tuple[int, ...]]
Sink = Callable[[Any], None]  # puts a tensor in a file, of which it may read slices, to its place


def load_quantised(model: nn.Module, directory: str | Path, seed: int = 0) -> None:
    """`weights.load_weights` for a model in which `quantise_model` has put quantised layers.

    They take full weights, which they quantise, or NF4 and its scales as bitsandbytes and
    transformers store them, with the values that these have. Each worker reads the whole of a
    weight of which it has a part. Raises one UserError naming every tensor that is missing,
    unexpected or of another shape; or one that names a weight which cannot be quantised.
    """
    directory = Path(directory)
    stored = _stored_shapes(directory)
    shapes, sinks = _plain(model, fill_new_head(model, directory, seed))
    for prefix, layer in model.named_modules():
        if isinstance(layer, QuantisedLinear):
            [name] = model_names_on_disk(model, f"{prefix}.weight")
            if f"{name}.{STATE}" in stored:
                parts = [f"{name}.{part}" for part in PARTS if f"{name}.{part}" in stored]
                shapes |= {part: stored[part] for part in parts}
                shapes[name] = stored.get(name, layer.whole)
                sink = _Gather(layer, name, frozenset([name, *parts]), directory)
                sinks |= {part: partial(sink, part) for part in [name, *parts]}
            else:
                shapes[name] = layer.whole
                sinks[name] = partial(_take_full, layer, name, directory)
    for file, names in find_tensors(directory, shapes, beyond_the_model(model)).items():
        with safe_open(file, framework="pt") as handle, torch.no_grad():
            for name in names:
                sinks[name](handle.get_slice(name))


@torch.no_grad()
def initialise_quantised(model: Decoder, seed: int) -> None:
    """`weights.initialise` where layers are quantised: they take what plain ones would be given."""
    initialise(model, seed)  # and overwrite what this has made of packed bytes
    rule = normal(model.config.initializer_range)
    for prefix, layer in model.named_modules():
        if isinstance(layer, QuantisedLinear):
            layer.take(drawn(f"{seed}:{prefix}.weight", layer.whole, rule)(()))


def _plain(model: nn.Module, new: set[str]) -> tuple[Shapes, dict[str, Sink]]:
    """What a model holds beside quantised weights, and what is `new`: shapes, and where it goes."""
    packed = {
        f"{prefix}.{name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, QuantisedLinear)
        for name in ("weight", *dict(layer.named_buffers(recurse=False)))
    }
    pieces: Mapping[str, Piece] = getattr(model, "pieces", {})
    shapes: Shapes = {}
    sinks: dict[str, Sink] = {}
    for name, tensor in named_tensors(model):
        if name in packed or name in new:
            continue
        piece, stacked = pieces.get(name), is_stacked(name)
        whole = tuple(tensor.shape) if piece is None else piece.whole
        for number, on_disk in enumerate(model_names_on_disk(model, name)):
            shapes[on_disk] = whole[1:] if stacked else whole
            sinks[on_disk] = partial(_copy, tensor, piece, number if stacked else None)
    return shapes, sinks


def _copy(tensor: Tensor, piece: Piece | None, expert: int | None, source: Any) -> None:
    write_part(tensor, source.__getitem__, piece, expert)


def _take_full(layer: QuantisedLinear, name: str, directory: Path, source: Any) -> None:
    _take(layer, source[:], name, directory)


def _take(layer: QuantisedLinear, weight: Tensor | NF4, name: str, directory: Path) -> None:
    try:
        layer.take(weight)
    except ValueError as error:
        raise UserError(Mistake(f"{name} {error}", NOT_PACKED, where=str(directory))) from error


class _Gather:
    """Waits for all the tensors of one weight, which may lie in several files."""

    def __init__(
        self, layer: QuantisedLinear, name: str, wanted: frozenset[str], directory: Path
    ) -> None:
        self.layer, self.name, self.wanted, self.directory = layer, name, wanted, directory
        self.parts: dict[str, Tensor] = {}

    def __call__(self, part: str, source: Any) -> None:
        self.parts[part] = source[:]
        if self.parts.keys() != self.wanted:
            return
        try:
            weight, _ = from_bitsandbytes(self.parts, self.name)
        except ValueError as error:
            fix = "take the model before it was quantised: it is quantised as it is loaded"
            what = f"{self.name} {error}"
            raise UserError(Mistake(what, fix, where=str(self.directory))) from error
        self.parts.clear()
        _take(self.layer, weight, self.name, self.directory)


def _stored_shapes(directory: Path) -> Shapes:
    """The shape of every tensor in the directory's files, as far as they can be read."""
    shapes: Shapes = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError):
            continue  # `find_tensors` tells of it, and of all others
    return shapes
