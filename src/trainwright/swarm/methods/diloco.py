"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): train alone, then step along what changed.

    inside   θ_i ← θ, then H steps of the recipe's optimizer, whose state stays with the peer
    outside  Δ = mean_i(θ − θ_i);  m ← μ m + Δ;  θ ← θ − η (Δ + μ m)        (Nesterov's SGD)

Contributions may be written by any codec (OpenDiLoCo's quantised pseudo-gradients). With a
`feedback_decay` β above 0 what a codec lost is made up for later: e ← β e + Δ;  q = Q(e);
e ← e − q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from trainwright.comm.codecs.build import build_codec
from trainwright.comm.codecs.codec import Plane, Planes
from trainwright.comm.codecs.error_feedback import encode_with_feedback
from trainwright.swarm.layout import Layout, put, take
from trainwright.swarm.methods.method import Agreed, Own, Received
from trainwright.swarm.settings import Settings

# Contributions, sorted by peer, as one: `swarm.aggregation` with the run's rules.
Combine = Callable[[Sequence[Received]], Tensor]


class DiLoCo:
    """See `swarm.methods.method.Method`; others of the family change a few lines of it."""

    takes: Literal["weights", "gradients"] = "weights"
    agrees = True

    def __init__(self, settings: Settings, layout: Layout, combine: Combine) -> None:
        self.name, self.inner_steps, self.delay = (
            settings.method,
            settings.inner_steps,
            settings.delay,
        )
        self.settings, self.layout, self.combine = settings, layout, combine
        self.codec = build_codec(settings.codec, density=settings.density)

    def fragment(self, round: int) -> tuple[slice, ...]:
        """All of it."""
        return (slice(0, self.layout.count),)

    def partners(self, round: int, members: Sequence[str], me: str, seed: int) -> list[str]:
        """Everybody."""
        return sorted(members)

    def begin(self, agreed: Agreed) -> Own:
        """Nothing is left unsent yet."""
        if not self.settings.feedback_decay:
            return Own()
        return Own({"unsent": torch.zeros_like(agreed.weights)})

    def outgoing(
        self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float
    ) -> tuple[Planes, Own]:
        """The change Δ since the agreed weights, and what stayed unsent before.

        A change that no round has taken in is still in `local`, and `own` has the rest: nothing is
        lost, and nothing is sent twice.
        """
        part = self.fragment(round)
        change = take(agreed.weights, part).sub(local)
        if not self.settings.feedback_decay:
            return self.codec.encode(change), own
        unsent = own.vectors["unsent"]
        planes, rest = encode_with_feedback(
            self.codec, change, take(unsent, part), self.settings.feedback_decay
        )
        after = unsent.clone()
        put(after, part, rest)
        return planes, Own({"unsent": after})

    def missed(self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float) -> Own:
        """As it was: the local weights carry the change."""
        return own

    def decode(self, planes: Sequence[Plane], round: int) -> Tensor:
        """Δ, or what the codec left of it, of the fragment's length."""
        return self.codec.decode(planes, self.values(round))

    def most_bytes(self, round: int) -> int:
        """The codec's most for the fragment."""
        return self.codec.most_bytes(self.values(round))

    def values(self, round: int) -> int:
        """Values of the round's fragment."""
        return sum(each.stop - each.start for each in self.fragment(round))

    def advance(self, agreed: Agreed, received: Sequence[Received], rate: float) -> Agreed:
        """The outer step on the fragment; a failed round, with nothing received, takes none."""
        after = agreed.copy()
        after.round += 1
        if received:
            part = self.fragment(agreed.round)
            self.outer_step(after, part, self.combine(received))
        return after

    def outer_step(self, agreed: Agreed, part: tuple[slice, ...], change: Tensor) -> None:
        """Nesterov's SGD, in place: operation by operation what torch.optim.SGD does."""
        mu, eta = self.settings.outer_momentum, self.settings.outer_learning_rate
        step = change
        if mu:
            whole = agreed.outer.setdefault("momentum", torch.zeros_like(agreed.weights))
            momentum = take(whole, part).mul(mu).add(change)
            put(whole, part, momentum)
            step = change.add(momentum.mul(mu))
        put(agreed.weights, part, take(agreed.weights, part).sub(step.mul(eta)))

    def merge(
        self, before: Agreed, after: Agreed, round: int, local: Tensor, sent: Tensor | None
    ) -> Tensor:
        """The agreed weights, plus whatever no round has taken in.

        That is the change since `sent`, where steps went on meanwhile; where the round left this
        peer out, the whole change since the agreed weights before it.
        """
        part = self.fragment(round)
        agreed = take(after.weights, part)
        if sent is None:  # exactly `local` after a failed round
            return local.add(agreed.sub(take(before.weights, part)))
        return agreed.add(local.sub(sent))  # exactly agreed where no step went on
