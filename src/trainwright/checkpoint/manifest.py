"""The manifest of a checkpoint: which tensors it holds, where their bytes lie, and every hash.

It is the last file written and the first one read. JSON, never pickle; it ends in a hash of its
own bytes, so that a single flipped bit in it is seen before anything in it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import torch

FORMAT = 1
MANIFEST = "manifest.json"
HASH_BYTES = 16

# Names that the safetensors format gives to dtypes; what has none cannot be saved.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SEAL = b',\n "blake2b": "'
_END = b'"\n}\n'


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint: name in its directory, size, blake2b-128 in hexadecimal."""

    name: str
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its corner and shape, and the file and byte where its elements begin."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    byte: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor as saved: dtype, global shape, and the chunks that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says about itself. `meta` is the caller's JSON."""

    step: int
    world_size: int
    metric: float | None
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]
    meta: dict[str, Any]
    torch_version: str = str(torch.__version__)

    def same_content(self, other: Manifest) -> bool:
        """Whether both describe the same tensors, byte for byte; `meta` may differ."""
        return self.files == other.files and dict(self.tensors) == dict(other.tensors)

    def to_bytes(self) -> bytes:
        """The file's content, its own hash last."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "torch": self.torch_version,
            "metric": self.metric,
            "meta": self.meta,
            "files": [asdict(file) for file in self.files],
            "tensors": {
                name: {**asdict(tensor), "dtype": DTYPE_NAMES[tensor.dtype]}
                for name, tensor in self.tensors.items()
            },
        }
        lines = (f' "{key}": {json.dumps(value)}' for key, value in body.items())
        sealed = ("{\n" + ",\n".join(lines)).encode()
        return sealed + _SEAL + content_hash(sealed).encode() + _END


def read_manifest(content: bytes) -> Manifest:
    """The manifest in a file's content. Raises ValueError when the content is not what was written
    or is of a format that this version does not know."""
    sealed, found, tail = content.rpartition(_SEAL)
    if not found or tail != content_hash(sealed).encode() + _END:
        raise ValueError("its content does not match its own hash")
    body = json.loads(content)
    if body["format"] != FORMAT:
        raise ValueError(
            f"it is of format {body['format']}, and this version of Trainwright reads {FORMAT}"
        )
    return Manifest(
        step=body["step"],
        world_size=body["world_size"],
        metric=body["metric"],
        files=tuple(StoredFile(**file) for file in body["files"]),
        tensors={name: _stored_tensor(entry) for name, entry in body["tensors"].items()},
        meta=body["meta"],
        torch_version=body["torch"],
    )


def content_hash(content: bytes) -> str:
    """blake2b-128 in hexadecimal."""
    return blake2b(content, digest_size=HASH_BYTES).hexdigest()


def _stored_tensor(entry: Mapping[str, Any]) -> StoredTensor:
    chunks = tuple(
        Chunk(tuple(chunk["offsets"]), tuple(chunk["shape"]), chunk["file"], chunk["byte"])
        for chunk in entry["chunks"]
    )
    return StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), chunks)
