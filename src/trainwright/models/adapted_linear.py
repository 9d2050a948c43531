"""Linear layers and embeddings with adapters: y = W x + b + scale · B A x, for each in use.

B A is never made: what a token adds goes through `rank` numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.models.adapted import Adapted, Factor, Update
from trainwright.models.adapter_spec import LayerAdapter


class AdaptedProduct(Adapted):
    """A linear layer with adapters, whatever makes the base's product.

    A subclass has `in_features`, `out_features` and `bias`, and makes `base_product`.
    """

    in_features: int
    out_features: int
    bias: Any  # a parameter, or None
    # Which outputs of the whole matrices are made here, where others are made by other workers.
    chosen: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, in] to [batch, sequence, out]."""
        bias = None if self.bias is None else self.own_outputs(self.bias)
        updates = self.updates()
        if bias is not None and all(update.factor is None for update in updates):
            return self._added(self.base_product(x, bias), x, updates)
        y = self._scaled_and_added(x, updates)
        return y if bias is None else y + bias.to(y.dtype)

    def unbiased(self, x: Tensor) -> Tensor:
        """What `forward` returns but for the bias, which nothing adapts."""
        return self._scaled_and_added(x, self.updates())

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias, without any adapter."""
        raise NotImplementedError

    def _scaled_and_added(self, x: Tensor, updates: list[Update]) -> Tensor:
        y = self.base_product(x, None)
        factors = [update.factor for update in updates if update.factor is not None]
        if factors:
            # Each adapter brings its own change of W x: the factors' distances from 1 add up.
            total = torch.stack(factors).sum(0) - (len(factors) - 1)
            y = y * total.to(y.dtype)
        return self._added(y, x, updates)

    def _added(self, y: Tensor, x: Tensor, updates: list[Update]) -> Tensor:
        for A, B, scale, share, factor in updates:
            B = self.own_outputs(B)
            if factor is not None:
                B = factor.unsqueeze(1) * B
            narrow = F.linear(self.dropped(x, share), A.to(x.dtype))
            # One operation multiplies, scales and adds.
            flat = torch.addmm(
                y.reshape(-1, y.shape[-1]),
                narrow.reshape(-1, narrow.shape[-1]),
                B.to(narrow.dtype).t(),
                alpha=scale,
            )
            y = flat.view(y.shape)
        return y

    def factors(self, name: str, which: str = "lora") -> tuple[Tensor, Tensor]:
        slot = self.slot(name)
        return getattr(slot, f"{which}_A").weight, getattr(slot, f"{which}_B").weight

    def sides(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def own_outputs(self, tensor: Tensor) -> Tensor:
        return tensor if self.chosen is None else tensor[self.chosen.to(tensor.device)]

    def weight_lengths(self, dtype: torch.dtype) -> Tensor:
        weight = self.own_outputs(self.base_weight())
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype)

    def _make_factors(self, slot: nn.Module, adapter: LayerAdapter) -> None:
        outputs, inputs = self.sides()
        for name in ["lora"] if adapter.init != "pissa" else ["lora", "start"]:
            for letter, shape in (("A", (adapter.rank, inputs)), ("B", (outputs, adapter.rank))):
                factor = Factor(self.parameter(*shape))
                slot.add_module(f"{name}_{letter}", factor.requires_grad_(name == "lora"))

    def _weight_times(self, a: Tensor) -> Tensor:
        weight = self.own_outputs(self.base_weight())
        return (weight @ a.to(weight.dtype).t()).to(a.dtype)

    def _plus_product(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return torch.addmm(weight, b, a, alpha=scale)

    def _by_output(self, values: Tensor) -> Tensor:
        return values.unsqueeze(1)


class AdaptedLinear(AdaptedProduct, nn.Linear):
    """An `nn.Linear` with adapters.

    Tensor parallelism cuts it as it cuts the layer: with some of the outputs, `lora_B.weight` and
    `lora_magnitude_vector` are cut as `weight` is; with some of the inputs, `lora_A.weight` is, the
    bias is added to the sum of all workers' `unbiased`, and DoRA needs `sum_squares`. Where the
    matrices stay whole, `chosen` numbers the outputs made here.
    """

    chosen: Tensor | None = None

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.own_outputs(self.weight), bias)

    def base_weight(self) -> Tensor:
        return self.weight


class AdaptedEmbedding(Adapted, nn.Embedding):
    """An `nn.Embedding` with adapters: its outputs are channels, its inputs tokens.

    `lora_embedding_A` is [rank, vocabulary], `lora_embedding_B` [hidden, rank]. Nothing is dropped.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens [batch, sequence] to [batch, sequence, hidden]."""
        updates = self.updates()
        hidden = base = F.embedding(input_ids, self.weight, self.padding_idx)
        for A, B, scale, _, factor in updates:
            narrow = F.embedding(input_ids, A.t(), self.padding_idx)
            added = F.linear(narrow, B * scale)
            if factor is not None:
                added = factor * (base + added) - base
            hidden = hidden + added.to(hidden.dtype)
        return hidden

    def factors(self, name: str, which: str = "lora") -> tuple[Tensor, Tensor]:
        slot = self.slot(name)
        return slot.lora_embedding_A, slot.lora_embedding_B  # type: ignore[return-value]

    def sides(self) -> tuple[int, int]:
        return self.embedding_dim, self.num_embeddings

    def base_weight(self) -> Tensor:
        return self.weight

    def weight_lengths(self, dtype: torch.dtype) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=0, dtype=dtype)

    def _make_factors(self, slot: nn.Module, adapter: LayerAdapter) -> None:
        outputs, inputs = self.sides()
        slot.register_parameter("lora_embedding_A", self.parameter(adapter.rank, inputs))
        slot.register_parameter("lora_embedding_B", self.parameter(outputs, adapter.rank))

    def _weight_times(self, a: Tensor) -> Tensor:
        return (a.to(self.weight.dtype) @ self.weight).t().to(a.dtype)

    def _plus_product(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return torch.addmm(weight, a.t(), b.t(), alpha=scale)

    def _by_output(self, values: Tensor) -> Tensor:
        return values.unsqueeze(0)
