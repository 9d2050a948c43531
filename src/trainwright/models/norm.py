"""The RMS norm as a module, so that its weight has a name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Normalises the last dimension; see `kernels.rms_norm`."""

    def __init__(self, channels: int, eps: float, offset: float) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((channels,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)
