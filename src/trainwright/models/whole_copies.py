"""Modules that an adapter replaces whole (PEFT's `modules_to_save`), and the weight of a head.

The copy that is trained is the module itself, so that names and shapes are where they were. What
the base model had there, and other adapters' copies, lie in `beside`.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.models.adapted import Adapted
from trainwright.models.adapted_linear import AdaptedEmbedding
from trainwright.models.adapter_spec import BESIDE, TRAINED

ORIGINAL = "original"  # what the base model had


class Copies(nn.ModuleDict):
    """Versions of a module beside the module itself: other adapters', and the base model's.

    `here` says whose the module itself is, `used` which one computes. Both are names of adapters,
    or "original". `ties` names those that a tied output head follows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here = self.used = ORIGINAL
        self.ties: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether that adapter has a copy of its own."""
        return name == self.here or name in self


def add_copy(module: nn.Module, name: str, *, ties: bool, keep_original: bool) -> None:
    """Give an adapter a copy of `module`, in use from now on, with the base model's values.

    The trained adapter's copy is the module itself; the base's is then kept only if
    `keep_original`. Parameters' values are copied where they are not on "meta".
    """
    copies = getattr(module, BESIDE, None)
    if copies is None:
        copies = Copies()
        module.add_module(BESIDE, copies)
        # On the instance, instead of wrapping it in another module: names stay what they are.
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    if name != TRAINED:
        copies[name] = _twin(version(module, ORIGINAL))
    elif keep_original:
        copies[ORIGINAL] = _twin(module)
    if name == TRAINED:
        copies.here = TRAINED
        module.requires_grad_(True)
        copies.requires_grad_(False)
    copies.used = name
    if ties:
        copies.ties.add(name)


def version(module: nn.Module, name: str | None = None) -> nn.Module:
    """The copy of `module` that is in use, or that of an adapter or "original".

    A module that no adapter replaces is its own. Raises ValueError where the original is asked for
    and was not kept.
    """
    copies = getattr(module, BESIDE, None)
    if not isinstance(copies, Copies):
        return module
    name = copies.used if name is None else name
    if name == copies.here:
        return module
    if name not in copies:
        raise ValueError(f"no copy {name!r} of this {type(module).__name__} was kept")
    return copies[name]


@torch.no_grad()
def bring_here(module: nn.Module, name: str) -> None:
    """Make the module itself the copy of that adapter, and a copy what it was before."""
    copies = getattr(module, BESIDE)
    assert isinstance(copies, Copies)
    if name == copies.here:
        return
    copy = version(module, name)
    before = _twin(module)
    for own, parameter in copy.named_parameters():
        module.get_parameter(own).copy_(parameter)
    for own, buffer in copy.named_buffers():
        module.get_buffer(own).copy_(buffer)
    del copies[name]
    copies[copies.here], copies.here = before, name


def head_weight(matrix: nn.Module) -> Tensor:
    """The weight [vocabulary, hidden] by which `matrix`, a linear layer or embedding, makes logits.

    With an adapter on the head it is made anew, whole and with gradients to the adapter. An
    embedding that is the head too gives its adapted weight where the adapter `ties`, and the base
    model's where it does not.
    """
    if isinstance(matrix, Adapted):
        names = matrix.active
        if isinstance(matrix, AdaptedEmbedding):
            names = tuple(name for name in names if matrix.adapters[name].ties)
        return matrix.updated(matrix.base_weight(), names)
    copies = getattr(matrix, BESIDE, None)
    if isinstance(matrix, nn.Embedding) and isinstance(copies, Copies):
        name = copies.used if copies.used in copies.ties else ORIGINAL
        return version(matrix, name).weight  # type: ignore[return-value]
    return version(matrix).weight  # type: ignore[return-value]


def _twin(module: nn.Module) -> nn.Module:
    """A frozen copy of a module, without what lies beside it and without a forward of its own."""
    copies = module._modules.pop(BESIDE, None)
    forward = vars(module).pop("forward", None)
    try:
        with torch.no_grad():
            return deepcopy(module).requires_grad_(False)
    finally:
        if copies is not None:
            module.add_module(BESIDE, copies)
        if forward is not None:
            module.forward = forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    used = version(module)
    if used is not module:
        return used(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)
