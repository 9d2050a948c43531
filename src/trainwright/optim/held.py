"""An optimizer that updates nothing: it holds whole gradients for an outer loop to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class HeldGradients(torch.optim.Optimizer):
    """Keeps each step's gradients in `held`, after clipping, until the next step's."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.held: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take the gradients as they are; the parameters stay as they were."""
        self.held = {
            parameter: parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
