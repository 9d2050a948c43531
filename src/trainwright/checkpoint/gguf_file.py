"""The GGUF container: key-values, a table of tensors, and their data, written piece by piece.

Format: version 3 of llama.cpp's docs/gguf.md, little-endian. The `gguf` package (extra `gguf`)
numbers the types and packs the blocks; its own writer takes a tensor whole, this one takes rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from trainwright.errors import UserError
from trainwright.files import opened_atomically

ALIGNMENT = 32  # where a tensor's data may begin
CHUNK = 1 << 24  # elements that are packed at a time
_HALF_MOST = float(np.finfo(np.float16).max)

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class Strings:
    """A list of strings that may be empty; of any other list, GGUF's type is its first item's."""

    items: Sequence[str]


@dataclass(frozen=True)
class PackedTensor:
    """A tensor to write: its name, its ggml type, and its rows.

    `shape` is torch's order. `parts` gives the values in turn, each [rows, columns] or a vector.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    parts: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.type)]
        return math.prod(self.shape) // block * size


def require_gguf() -> None:
    """UserError with the command that installs the `gguf` package, where it is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        fix = "pip install 'trainwright[gguf]'"
        raise UserError("GGUF files need the package gguf", fix) from error


def write_gguf(path: Path, values: Mapping[str, Any], tensors: Sequence[PackedTensor]) -> None:
    """Write a GGUF file: beside first, flushed to disk, then renamed to `path`.

    `values` are key-values as Python has them: int becomes uint32, float float32, lists of them
    int32 and float32. No more than a part of a tensor is in memory. Raises UserError for a value
    that its type cannot hold.
    """
    with opened_atomically(path) as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)))
        for key, value in values.items():
            file.write(_string(key) + _typed(value))
        offset = 0
        for tensor in tensors:
            place = struct.pack("<IQ", tensor.type, offset)
            sizes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            file.write(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
            file.write(sizes + place)
            offset += tensor.bytes + -tensor.bytes % ALIGNMENT
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            _write_data(file, tensor)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _write_data(file: BinaryIO, tensor: PackedTensor) -> None:
    start = file.tell()
    for part in tensor.parts():
        rows = part.reshape(-1, part.shape[-1])
        for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
            file.write(_packed(tensor, chunk.to(torch.float32).numpy()).tobytes())
    assert file.tell() - start == tensor.bytes, tensor.name


def _packed(tensor: PackedTensor, values: np.ndarray) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType(tensor.type)
    if not np.isfinite(values).all():
        raise UserError(f"{tensor.name} holds values that are not finite", "choose another step")
    if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > _HALF_MOST:
        raise UserError(f"{tensor.name} holds values that f16 cannot", "choose bf16 or f32")
    return gguf.quants.quantize(values, kind)


def _typed(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, Strings):
        return _array(8, value.items, _string)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value[0], bool):
        return _array(7, value, lambda item: struct.pack("<?", item))
    if isinstance(value[0], int):
        return _array(5, value, lambda item: struct.pack("<i", item))
    return _array(6, value, lambda item: struct.pack("<f", item))


def _array(kind: int, items: Sequence[Any], pack: Callable[[Any], bytes]) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(items)) + _joined(map(pack, items))


def _joined(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
