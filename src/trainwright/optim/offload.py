"""Optimizers on the host: states and updates in its memory and on its cores (ZeRO-Offload).

Ren et al. 2021, "ZeRO-Offload". The device keeps weights and gradients; a step copies gradients
down, updates the host's copies of the weights, and copies those up. On a CPU both are host memory,
and the numbers are those of the plain optimizer, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.comm.local import local
from trainwright.optim.muon import Whole

Copies = Mapping[nn.Parameter, nn.Parameter]


def on_host(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """A copy on the host for each parameter, a part of the same whole where it is a DTensor."""
    copies = ((p, _host_buffer(p).copy_(local(p).detach())) for p in parameters)
    return {p: nn.Parameter(as_part_of(p, copy)) for p, copy in copies}


class OffloadedOptimizer(torch.optim.Optimizer):
    """Runs `inner`, an optimizer over host copies, for the parameters that they are copies of.

    `param_groups` and `state` are by the model's parameters; the states are the inner optimizer's
    own tensors, on the host, to be saved and loaded in place. Weights that somebody else has
    written since the last step, such as a checkpoint's, are noticed and copied down first.
    """

    def __init__(self, inner: torch.optim.Optimizer, copies: Copies) -> None:
        originals = {id(copy): p for p, copy in copies.items()}
        groups = [
            {**group, "params": [originals[id(copy)] for copy in group["params"]]}
            for group in inner.param_groups
        ]
        super().__init__(groups, inner.defaults)
        self.inner = inner
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.pairs = [(p, copies[p]) for p in parameters]
        # A number that grows with every write; the copies were made just now.
        self.versions = [local(p)._version for p in parameters]
        self._gradients = [_host_buffer(p) for p in parameters]
        self._link_state()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key != "params"})
        self._copy_down()
        self.inner.step()
        for index, (parameter, copy) in enumerate(self.pairs):
            if copy.grad is not None:
                own = local(parameter)
                own.copy_(local(copy), non_blocking=True)
                self.versions[index] = own._version
        self._link_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As an optimizer's own, with the states on the host."""
        self.inner.load_state_dict(state_dict)
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})
        self._link_state()

    def _copy_down(self) -> None:
        for index, (parameter, copy) in enumerate(self.pairs):
            own = local(parameter)
            if own._version != self.versions[index]:
                local(copy).copy_(own, non_blocking=True)
            copy.grad = None
            if parameter.grad is not None:
                buffer = self._gradients[index]
                buffer.copy_(local(parameter.grad), non_blocking=True)
                copy.grad = as_part_of(parameter, buffer)
        # Also for the last step's copies up: the inner step writes what they read.
        for device in {p.device for p, _ in self.pairs if p.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()

    def _link_state(self) -> None:
        for parameter, copy in self.pairs:
            if copy in self.inner.state:
                self.state[parameter] = self.inner.state[copy]


def whole_on_host(whole: Whole, copies: Copies) -> Whole:
    """`whole`, which knows the model's parameters, for their copies."""
    return _WholeOnHost(whole, {id(copy): p for p, copy in copies.items()})


class _WholeOnHost:
    def __init__(self, whole: Whole, originals: Mapping[int, nn.Parameter]) -> None:
        self.inner, self.originals = whole, originals

    def shape(self, parameter: Tensor) -> torch.Size:
        return self.inner.shape(self.originals[id(parameter)])

    def whole(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        return self.inner.whole(self.originals[id(parameter)], tensor)

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return self.inner.own(self.originals[id(parameter)], whole)


def _host_buffer(parameter: Tensor) -> Tensor:
    """Host memory for what this worker holds of a parameter; pinned where a GPU reads it."""
    own = local(parameter)
    return torch.empty_like(own, device="cpu", pin_memory=own.device.type == "cuda")


def as_part_of(parameter: Tensor, local: Tensor) -> Tensor:
    """`local`, which may be on the host, as the same part of a whole as `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    # Not `from_local`, which would move it to the mesh's devices.
    return DTensor(local, parameter._spec, requires_grad=False)
