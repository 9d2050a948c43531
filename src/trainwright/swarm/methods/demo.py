"""DeMo (Peng, Quesnelle, Kingma 2024, arXiv 2411.19870): momentum that peers do not share.

At every step, with g the peer's own gradient:

    δ ← β δ + lr g;   q = the largest coefficients of δ's chunked DCT;   δ ← δ − q
    θ ← θ (1 − lr wd) − lr sign(iDCT(mean_i q_i))

Fast components of the momentum are sent, slow ones gather. Defaults: 32 of a chunk's 4096
coefficients in bf16, β 0.999. With an `outer_momentum` μ a share of what was sent stays (the second
version's α is 1 − μ): with all coefficients that is Signum. Norms and biases have no weight decay,
as everywhere here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.codec import Plane, Planes
from trainwright.comm.codecs.dct import DctTopK
from trainwright.comm.codecs.error_feedback import encode_with_feedback, total_of
from trainwright.swarm.layout import Layout
from trainwright.swarm.methods.diloco import Combine
from trainwright.swarm.methods.method import Agreed, Own, Received
from trainwright.swarm.settings import Settings


class DeMo:
    """See `swarm.methods.method.Method`. The settings' codec is that of the coefficients."""

    takes: Literal["weights", "gradients"] = "gradients"
    agrees = True

    def __init__(self, settings: Settings, layout: Layout, combine: Combine) -> None:
        self.name, self.inner_steps, self.delay = settings.method, 1, settings.delay
        self.settings, self.layout, self.combine = settings, layout, combine
        self.codec = DctTopK(
            [shape for _, shape in layout.shapes],
            density=settings.density,
            values=build_codec(settings.codec, density=settings.density),
        )
        self.matrices = layout.part(name for name, shape in layout.shapes if len(shape) > 1)

    def fragment(self, round: int) -> tuple[slice, ...]:
        """All of it."""
        return (slice(0, self.layout.count),)

    def partners(self, round: int, members: Sequence[str], me: str, seed: int) -> list[str]:
        """Everybody."""
        return sorted(members)

    def begin(self, agreed: Agreed) -> Own:
        """No momentum yet."""
        return Own({"momentum": torch.zeros_like(agreed.weights)})

    def outgoing(
        self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float
    ) -> tuple[Planes, Own]:
        """The momentum's largest coefficients; own is the momentum without them."""
        planes, momentum = encode_with_feedback(
            self.codec, local.mul(rate), own.vectors["momentum"], self.settings.feedback_decay
        )
        if self.settings.outer_momentum:
            sent = self.codec.decode(planes, self.layout.count)
            momentum = momentum.add(sent.mul(self.settings.outer_momentum))
        return planes, Own({"momentum": momentum})

    def missed(self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float) -> Own:
        """The momentum with the gradient and without a loss: nothing of it was sent."""
        before = own.vectors["momentum"]
        return Own({"momentum": total_of(local.mul(rate), before, self.settings.feedback_decay)})

    def decode(self, planes: Sequence[Plane], round: int) -> Tensor:
        """The coefficients [count], zero where none was sent."""
        return self.codec.coefficients(planes)

    def most_bytes(self, round: int) -> int:
        """The codec's most for the whole vector."""
        return self.codec.most_bytes(self.layout.count)

    def advance(self, agreed: Agreed, received: Sequence[Received], rate: float) -> Agreed:
        """A step along the signs, of `rate` times the outer learning rate; none if it failed."""
        after = agreed.copy()
        after.round += 1
        if not received:
            return after
        step = rate * self.settings.outer_learning_rate
        for each in self.matrices:
            after.weights[each] = after.weights[each].mul(1 - step * self.settings.weight_decay)
        signs = self.codec.transform.inverse(self.combine(received)).sign()
        after.weights = after.weights.sub(signs.mul(step))
        return after

    def merge(
        self, before: Agreed, after: Agreed, round: int, local: Tensor, sent: Tensor | None
    ) -> Tensor:
        """The agreed weights: a peer has no others, and what it has not sent is in `own`."""
        return after.weights.clone()
