"""Parts: what one rank holds of each tensor, and DCP's planners over them.

A rank's part of a DTensor is its shard, of a plain tensor the whole; inner tensors of quantised
optimizer states are cut in ways that no DTensor describes, so they come as parts to begin with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainwright.checkpoint.manifest import DTYPE_NAMES
from trainwright.errors import UserError


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor: the box `local` at `offsets` in a tensor of `shape`.

    `local` shares memory with the tensor it was taken from, so loading fills that in place.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def numel(self) -> int:
        """Elements of the whole tensor."""
        return torch.Size(self.shape).numel()

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.local.element_size()

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)


def group_of(name: str) -> str:
    """A tensor's group, which has files of its own: the first word of its name, such as `model`."""
    return name.partition(".")[0]


def part_of(name: str, tensor: Tensor | Part) -> Part | None:
    """The part of `tensor` (plain, DTensor, or a Part already) that this rank holds.

    None where the rank is outside the DTensor's mesh, or holds no element of a tensor that has
    some. Raises TypeError for what cannot be stored.
    """
    if isinstance(tensor, Part):
        part = tensor
    elif isinstance(tensor, DTensor):
        if tensor.device_mesh.get_coordinate() is None:
            return None
        (chunk,) = tensor.__create_chunk_list__()
        with torch.no_grad():
            local = tensor.to_local()
        part = Part(tuple(tensor.shape), tuple(chunk.offsets), local)
    else:
        part = Part(tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
    if is_traceable_wrapper_subclass(part.local):
        raise TypeError(f"{name}: save the inner tensors of {type(part.local).__name__} instead")
    if part.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name}: safetensors files cannot hold {part.dtype}")
    return None if part.local.numel() == 0 and part.numel() else part


class PartsSavePlanner(DefaultSavePlanner):
    """DCP's save planner over parts. What lies on several ranks is written by one of them."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, part) for name, part in self.parts.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        try:
            return super().create_global_plan(all_plans)
        except ValueError as error:
            raise UserError(
                f"the workers' parts do not make up whole tensors: {error}",
                fix="8-bit optimizer states of uneven shards do this: choose `optimizer.name: "
                "adamw`, or another number of workers",
            ) from error

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn].local


class PartsLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner over parts: which boxes of the saved chunks fill them."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, part in self.parts.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, saved, [part.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn].local


def _write_item(name: str, part: Part) -> WriteItem:
    properties = TensorProperties(dtype=part.dtype)
    whole = torch.Size(part.shape)
    return WriteItem(
        MetadataIndex(name, part.chunk.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(part.chunk, properties, whole),
    )


class Staging:
    """Host copies of parts, in memory that is kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Parts that are copies in host memory: the originals may change once this returns."""
        self._buffers = {name: self._buffer(name, part.local) for name, part in parts.items()}
        for name, part in parts.items():
            self._buffers[name].copy_(part.local, non_blocking=True)
        for device in {part.local.device for part in parts.values() if part.local.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return {
            name: Part(part.shape, part.offsets, self._buffers[name])
            for name, part in parts.items()
        }

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is not None and known.shape == like.shape and known.dtype == like.dtype:
            return known
        # Pinned memory lets the device copy at the bus's full speed.
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
