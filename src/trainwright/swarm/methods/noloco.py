"""NoLoCo (Kolehmainen et al. 2025, arXiv 2506.10911): random pairs, and no agreement at all.

Each peer has slow weights φ_i of its own, and in each round hears one other peer:

    δ_i ← α δ_i + β mean_j(θ_j − φ_j) + β (mean_j φ_j − φ_i);  φ_i ← φ_i + δ_i;  θ_i ← φ_i

with j over the pair (signs and γ = β from the release: the paper's own text would ascend). The
second mean draws the peers' weights together, and all of them drift towards one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor

from trainwright.comm.codecs.codec import BrokenPlanes, Plane, Planes
from trainwright.swarm.methods.diloco import DiLoCo
from trainwright.swarm.methods.method import Agreed, Own, Received


class NoLoCo(DiLoCo):
    """Contributions are two vectors: Δ = φ − θ, then φ. α is the settings' outer momentum, β their
    outer learning rate.
    """

    agrees = False

    def partners(self, round: int, members: Sequence[str], me: str, seed: int) -> list[str]:
        """This peer and whom it is paired with, alike for all; of an odd number three meet."""
        order = sorted(members, key=lambda each: sha256(f"{seed}:{round}:{each}".encode()).digest())
        groups = [order[first : first + 2] for first in range(0, len(order) - 1, 2)] or [order]
        if len(order) % 2 and len(order) > 1:
            groups[-1].append(order[-1])
        return sorted(next(group for group in groups if me in group))

    def outgoing(
        self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float
    ) -> tuple[Planes, Own]:
        """Both vectors, each in the codec's planes."""
        change = agreed.weights.sub(local)
        return [*self.codec.encode(change), *self.codec.encode(agreed.weights)], own

    def decode(self, planes: Sequence[Plane], round: int) -> Tensor:
        """Δ and φ, one after the other."""
        half, odd = divmod(len(planes), 2)
        if odd:
            raise BrokenPlanes(f"{len(planes)} planes are not those of two vectors")
        both = [
            self.codec.decode(each, self.layout.count) for each in (planes[:half], planes[half:])
        ]
        return torch.cat(both)

    def most_bytes(self, round: int) -> int:
        """Two vectors' most."""
        return 2 * self.codec.most_bytes(self.layout.count)

    def advance(self, agreed: Agreed, received: Sequence[Received], rate: float) -> Agreed:
        """This peer's next slow weights, from those of its pair that were heard."""
        after = agreed.copy()
        after.round += 1
        if not received:
            return after
        count, alpha, beta = (
            self.layout.count,
            self.settings.outer_momentum,
            self.settings.outer_learning_rate,
        )
        change = self.combine([replace(each, values=each.values[:count]) for each in received])
        # What a codec does to φ must not count as a distance: own φ goes through it as well.
        own = self.codec.decode(self.codec.encode(agreed.weights), count)
        apart = torch.zeros(count)
        for each in received:
            apart = apart.add(each.values[count:].sub(own).div(len(received)))
        momentum = after.outer.get("momentum", torch.zeros(count))
        momentum = momentum.mul(alpha).add(apart.sub(change).mul(beta))
        after.outer["momentum"] = momentum
        after.weights = agreed.weights.add(momentum)
        return after
