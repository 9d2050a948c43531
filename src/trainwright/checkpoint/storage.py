"""Storage for torch's distributed checkpointing (DCP): safetensors files, hashed as written.

DCP decides which rank saves what and which saved pieces a tensor is put together from again; here
those bytes meet files. Tensors only: nothing is pickled, unlike in DCP's own storage.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainwright.checkpoint.manifest import (
    DTYPE_NAMES,
    HASH_BYTES,
    Chunk,
    Manifest,
    StoredFile,
    StoredTensor,
)
from trainwright.checkpoint.parts import group_of

FILE_BYTES = 2**30  # a new file is begun beyond this, so that ranks share the work of verifying
BLOCK_BYTES = 2**23  # hashed and written while still in the processor's cache


@dataclass(frozen=True)
class _Assignment:
    """What rank 0 tells each rank: where to write, and as which rank."""

    directory: Path
    rank: int


@dataclass(frozen=True)
class _Stored:
    """What a rank answers for each item: the file it went into, and the byte it begins at."""

    file: StoredFile
    byte: int


class SafetensorsWriter(StorageWriter):
    """Writes each rank's items into files of its own and hashes the bytes on their way.

    On rank 0, `prepare(total_bytes)` makes the directory to write into, and `commit(files,
    tensors)` is called once every rank's files are on disk. What either raises, and what a write
    raises on any rank, DCP raises on all of them.
    """

    def __init__(
        self,
        prepare: Callable[[int], Path],
        commit: Callable[[tuple[StoredFile, ...], dict[str, StoredTensor]], None],
    ) -> None:
        self._prepare, self._commit = prepare, commit

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer serves one save; there is nothing to reset."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether DCP may pick this storage for a path by itself: no, it is always passed."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank is told what to do with its plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """A rank's wishes pass as they are."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0: make room, and tell everyone where."""
        total = sum(_item_bytes(item) for plan in plans for item in plan.items)
        directory = self._prepare(total)
        return [
            replace(plan, storage_data=_Assignment(directory, rank))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Each rank: write, hash and flush its files."""
        task: _Assignment = plan.storage_data
        results: list[WriteResult] = []
        for number, items in enumerate(_into_files(plan.items)):
            name = f"{_group(items[0])}-{task.rank:05d}-{number:03d}.safetensors"
            entries = [_entry(planner, item) for item in items]
            file, starts = write_file(task.directory / name, entries)
            results += [
                WriteResult(item.index, _item_bytes(item), _Stored(file, start))
                for item, start in zip(items, starts, strict=True)
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0: everything is written; list it and commit."""
        stored = [result for of_rank in results for result in of_rank]
        where = {(result.index.fqn, result.index.offset): result.storage_data for result in stored}
        tensors = {}
        for name, saved in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(saved, TensorStorageMetadata)
            chunks = tuple(
                Chunk(tuple(box.offsets), tuple(box.sizes), at.file.name, at.byte)
                for box in saved.chunks
                for at in (where[name, box.offsets],)
            )
            tensors[name] = StoredTensor(saved.properties.dtype, tuple(saved.size), chunks)
        files = {result.storage_data.file for result in stored}
        self._commit(tuple(sorted(files, key=lambda file: file.name)), tensors)


class SafetensorsReader(StorageReader):
    """Reads the boxes that a load plan asks for. The files' hashes are verified before."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader serves one load; there is nothing to reset."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether DCP may pick this storage for a path by itself: no, it is always passed."""
        return False

    def read_metadata(self) -> Metadata:
        """The manifest in DCP's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
                        for chunk in tensor.chunks
                    ],
                )
                for name, tensor in self._manifest.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The manifest is at hand already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """A rank reads what it asks for."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank's plan stands."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors in place."""
        for item in plan.items:
            tensor = self._manifest.tensors[item.storage_index.fqn]
            assert item.storage_index.index is not None
            chunk = tensor.chunks[item.storage_index.index]
            box = read_box(self._directory, tensor.dtype, chunk, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item)
            with torch.no_grad():
                target.copy_(box)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_tensor(directory: Path, tensor: StoredTensor) -> Tensor:
    """A stored tensor, put together from its chunks on the CPU."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for chunk in tensor.chunks:
        target = whole
        for dimension, (low, size) in enumerate(zip(chunk.offsets, chunk.shape, strict=True)):
            target = target.narrow(dimension, low, size)
        target.copy_(read_box(directory, tensor.dtype, chunk, (0,) * whole.ndim, chunk.shape))
    return whole


def read_box(
    directory: Path,
    dtype: torch.dtype,
    chunk: Chunk,
    offsets: Iterable[int],
    lengths: Iterable[int],
) -> Tensor:
    """The box [offsets, offsets + lengths) of a stored chunk, as a tensor of its own on the CPU.

    Reads the chunk's rows (its first dimension) that the box touches, and no others.
    """
    offsets, lengths = tuple(offsets), tuple(lengths)
    rows = chunk.shape
    first = 0
    if rows:
        rows, first = (lengths[0], *rows[1:]), offsets[0] * torch.Size(rows[1:]).numel()
    count = torch.Size(rows).numel()
    if count == 0:
        return torch.empty(lengths, dtype=dtype)
    buffer = bytearray(count * dtype.itemsize)
    path = directory / chunk.file
    with path.open("rb", buffering=0) as file:
        file.seek(chunk.byte + first * dtype.itemsize)
        view = memoryview(buffer)
        while view and (read := file.readinto(view)):
            view = view[read:]
    if view:
        raise OSError(f"{path} ends before the tensor it should hold")
    box = torch.frombuffer(buffer, dtype=dtype).reshape(rows)
    for dimension in range(1, len(rows)):
        box = box.narrow(dimension, offsets[dimension], lengths[dimension])
    return box


@dataclass(frozen=True)
class Entry:
    """A tensor to write: known by dtype and shape, made only when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> tuple[StoredFile, list[int]]:
    """Write a safetensors file and flush it to disk; its record, and where each tensor begins.

    One tensor is in memory at a time. The hash is taken from the bytes there, before the disk had
    a chance to change them.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts = [0, *accumulate(entry.bytes for entry in entries)]
    for entry, start in zip(entries, starts, strict=False):
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps what follows aligned
    head = len(text).to_bytes(8, "little") + text
    digest = blake2b(digest_size=HASH_BYTES)
    with path.open("xb", buffering=0) as file:
        for content in chain([memoryview(head)], (_bytes(entry.make()) for entry in entries)):
            for begin in range(0, len(content), BLOCK_BYTES):
                block = content[begin : begin + BLOCK_BYTES]
                digest.update(block)
                while block:
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    record = StoredFile(path.name, len(head) + starts[-1], digest.hexdigest())
    return record, [len(head) + start for start in starts[:-1]]


def hash_file(path: Path) -> str:
    """blake2b-128 of a file's content, read in blocks."""
    digest = blake2b(digest_size=HASH_BYTES)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _entry(planner: SavePlanner, item: WriteItem) -> Entry:
    assert item.tensor_data is not None
    dtype, shape = item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)

    def make() -> Tensor:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        return data

    return Entry(_entry_name(item), dtype, shape, make)


def _item_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    size = item.tensor_data.chunk.sizes.numel()
    return size * item.tensor_data.properties.dtype.itemsize


def _entry_name(item: WriteItem) -> str:
    """A chunk's name in its file: the tensor's name, and the box where it is not the whole."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    box = (f"{low}:{low + size}" for low, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return f"{item.index.fqn}[{','.join(box)}]"


def _group(item: WriteItem) -> str:
    """The item's group, fit for a file name."""
    return re.sub(r"[^A-Za-z0-9_]", "_", group_of(item.index.fqn))[:40] or "tensors"


def _into_files(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Items by group, then by falling element size, so that each lies aligned in its file."""
    files: list[list[WriteItem]] = []
    filled = 0

    def order(item: WriteItem) -> tuple[str, int, str, torch.Size | None]:
        assert item.tensor_data is not None
        itemsize = item.tensor_data.properties.dtype.itemsize
        return _group(item), -itemsize, item.index.fqn, item.index.offset

    for item in sorted(items, key=order):
        fits = filled + _item_bytes(item) <= FILE_BYTES
        if not files or not fits or _group(files[-1][0]) != _group(item):
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += _item_bytes(item)
    return files
