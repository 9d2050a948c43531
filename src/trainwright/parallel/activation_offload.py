"""Activations that wait for their backward pass in the host's memory instead of the device's.

`offloaded_activations` goes around a forward pass. What autograd saves in it is copied to pinned
memory on a stream of its own, beside the computing, and is fetched back one tensor ahead of its
use. On a CPU the device's memory is the host's: tensors go the same way but are not copied.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 1 << 16  # bytes; less is not worth a transfer


class Kept:
    """A tensor kept for later; `tensor()` gives it back, as often as it is asked."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self) -> Tensor:
        return self._tensor


class _OnHost(Kept):
    """A device's tensor, kept in the host's memory."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, before: _OnHost | None) -> None:
        self.stream, self.device, self.readers = stream, tensor.device, 0
        # Not held: a later tensor must not keep an earlier one's memory from being freed.
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.fetched: tuple[Tensor, torch.cuda.Event] | None = None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is made

    def fetch(self) -> tuple[Tensor, torch.cuda.Event]:
        """Start the way back, if it has not started."""
        if self.fetched is None:
            with torch.cuda.stream(self.stream):
                tensor = self.host.to(self.device, non_blocking=True)
                self.fetched = tensor, self.stream.record_event()
        return self.fetched

    def tensor(self) -> Tensor:
        tensor, event = self.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        tensor.record_stream(current)
        self.readers -= 1
        if self.readers <= 0:
            self.fetched = None
        # Backward passes read in the reverse of the order that was kept.
        before = self.before()
        if before is not None and before.readers > 0:
            before.fetch()
        return tensor


class _Offload:
    """What one forward pass has put away: a tensor that several operations save goes once."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[StorageWeakRef, Kept]] = {}
        self.newest: _OnHost | None = None

    def keep(self, tensor: Tensor) -> Kept:
        if tensor.nbytes < SMALLEST or type(tensor) is not Tensor or _is_weight(tensor):
            return Kept(tensor)
        storage = tensor.untyped_storage()
        place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage._cdata, place, tensor._version)
        if key not in self.known:
            # The weak reference keeps the storage's identity from being given to another.
            self.known[key] = StorageWeakRef(storage), self._put_away(tensor)
        kept = self.known[key][1]
        if isinstance(kept, _OnHost):
            kept.readers += 1
        return kept

    def _put_away(self, tensor: Tensor) -> Kept:
        if tensor.device.type != "cuda":
            return Kept(tensor)
        self.newest = _OnHost(tensor, _stream(tensor.device), self.newest)
        return self.newest


class _Active(threading.local):
    offload: _Offload | None = None


_active = _Active()
_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def offloaded_activations(wanted: bool) -> Iterator[None]:
    """Around a forward pass: what its backward pass needs waits on the host, if `wanted`.

    Weights stay where they are, and so does what is smaller than `SMALLEST`.
    """
    if not wanted:
        yield
        return
    offload, outer = _Offload(), _active.offload
    _active.offload = offload
    try:
        with torch.autograd.graph.saved_tensors_hooks(offload.keep, Kept.tensor):
            yield
    finally:
        _active.offload = outer


def keep(tensor: Tensor) -> Kept:
    """Keep what autograd does not know of, where `offloaded_activations` would keep it."""
    offload = _active.offload
    return Kept(tensor) if offload is None else offload.keep(tensor)


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, a view of one, or autocast's narrow copy of one."""
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, nn.Parameter):
        return True
    cast = base.grad_fn
    if cast is None or cast.name() != "ToCopyBackward0":
        return False
    return any(f is not None and "AccumulateGrad" in f.name() for f, _ in cast.next_functions)


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
