"""What a step does for a mixture of experts: its router losses, its biases, its figures."""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.models.decoder import Decoder
from trainwright.models.router_balance import (
    router_metrics,
    set_router_losses,
    set_router_scale,
    take_router_loads,
    update_router_biases,
)
from trainwright.parallel.spread import SpreadModel
from trainwright.recipe.schema import Training

# DeepSeek-V3's (arXiv:2412.19437, section 4.2), for models whose routers have biases.
DEFAULT_BIAS_RATE = 1e-3


@dataclass(frozen=True)
class Routers:
    """The routers of a spread model in training."""

    spread: SpreadModel
    bias_rate: float

    @classmethod
    def of(cls, spread: SpreadModel, training: Training) -> Routers | None:
        """Those of `spread`, their losses set; None for a model without experts."""
        part = spread.parts[0]
        experts = part.config.experts if isinstance(part, Decoder) else None
        if experts is None:
            return None
        balance, rate = training.router_balance_loss, training.router_bias_rate
        set_router_losses(
            spread.parts,
            balance_loss=experts.balance_loss if balance is None else balance,
            z_loss=training.router_z_loss or 0.0,
            columns=spread.mesh.group("cp"),
            copies=spread.mesh.size("tp"),
        )
        return cls(spread, DEFAULT_BIAS_RATE if rate is None else rate)

    def before_step(self, scale: float) -> None:
        """`scale` is what the step multiplies its loss sums by."""
        set_router_scale(self.spread.parts, scale)

    def after_step(self, skipped: bool) -> dict[str, float]:
        """Move the biases against the step's loads, unless it was skipped; the step's figures."""
        set_router_scale(self.spread.parts, 0.0)
        mesh = self.spread.mesh
        loads = take_router_loads(self.spread.parts, mesh.group("replicas"))
        if not skipped:
            update_router_biases(loads, self.bias_rate)
        return router_metrics(loads, mesh.group("pp"))
