"""Adapters over linear layers whose weights are in 4 or 8 bits: QLoRA (arXiv:2305.14314)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.models.adapted_linear import AdaptedProduct
from trainwright.models.quantised import QuantisedLinear


class AdaptedQuantised(AdaptedProduct, QuantisedLinear):
    """A quantised layer with adapters: the base's products are its own."""

    chosen = None

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return QuantisedLinear.base_product(self, x, bias)

    def base_weight(self) -> Tensor:
        return self.dequantised()

    def weight_lengths(self, dtype: torch.dtype) -> Tensor:
        return torch.linalg.vector_norm(self.dequantised(dtype), dim=1)

    def _weight_times(self, a: Tensor) -> Tensor:
        return self.base_product(a, None).t()
