"""What a method is, and the two kinds of state that it has: agreed, and a peer's own.

Agreed state is a function of the genesis weights and of the contributions of every round: all peers
compute it, bit for bit. For that it is made of fp32 vectors on the CPU, by elementwise operations
that IEEE 754 rounds correctly, one at a time (`a.mul(x).add(b)`, never `add(b, alpha=x)`, whose
rounding depends on the processor), over peers in the order of their names. Sums over elements are
taken in fp64 and rounded to 16 significant bits before they touch a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from trainwright.comm.codecs.codec import Planes
from trainwright.swarm.layout import Layout


@dataclass
class Agreed:
    """What all peers have after so many rounds.

    `weights` is fp32 [count]; `outer` has the outer optimizer's vectors by name, such as momentum.
    Under NoLoCo, which agrees on nothing, these are the peer's own slow weights.
    """

    round: int  # the round that comes next
    weights: Tensor
    outer: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> Agreed:
        """One that shares no memory with this one."""
        outer = {name: values.clone() for name, values in self.outer.items()}
        return Agreed(self.round, self.weights.clone(), outer)


@dataclass
class Own:
    """What a peer keeps to itself from round to round: error feedback, decoupled momentum.

    It is in the peer's checkpoints, and in nobody else's.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Received:
    """A peer's contribution to a round, as everybody reads it.

    `values` is what the codec decoded, fp32 of the fragment's length (for methods that send several
    vectors, one after the other); `weight` is the tokens that it stands for, times what its
    peer's score leaves of them.
    """

    peer: str
    values: Tensor
    weight: float


class Method(Protocol):
    """One way to train together. Rounds are counted from 0; round r is of fragment r mod P."""

    name: str
    layout: Layout
    takes: Literal["weights", "gradients"]  # what `outgoing` is given
    agrees: bool  # whether all peers have the same weights after a round
    inner_steps: int  # between two rounds (of neighbouring fragments)
    delay: int  # steps that go on between sending and merging

    def fragment(self, round: int) -> tuple[slice, ...]:
        """Where the values of this round lie in the vector of all weights."""
        ...

    def partners(self, round: int, members: Sequence[str], me: str, seed: int) -> list[str]:
        """Whose contributions this peer needs, itself among them: all, but for NoLoCo's pairs."""
        ...

    def begin(self, agreed: Agreed) -> Own:
        """A new peer's own state."""
        ...

    def outgoing(
        self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float
    ) -> tuple[Planes, Own]:
        """What to send, and the own state after it, which holds if the round takes it in.

        `local` is fp32, this peer's part of the fragment: its weights now, or its whole gradient.
        `rate` is the inner learning rate. `own` is left as it is: where the round fails or ends
        without this peer, `missed` says what becomes of it, and the change is part of the next
        contribution.
        """
        ...

    def missed(self, agreed: Agreed, own: Own, round: int, local: Tensor, rate: float) -> Own:
        """The own state after a round that failed or ended without what `outgoing` was given.

        A gradient is kept there for the next contribution; changed weights are their own memory.
        """
        ...

    def decode(self, planes: Sequence, round: int) -> Tensor:
        """What a contribution says, of the length of `Received.values`. Raises BrokenPlanes."""
        ...

    def most_bytes(self, round: int) -> int:
        """The most bytes of planes that a contribution can have."""
        ...

    def advance(self, agreed: Agreed, received: Sequence[Received], rate: float) -> Agreed:
        """The agreed state after its round, from all contributions (sorted by peer); `agreed`
        is left as it is.
        """
        ...

    def merge(
        self, before: Agreed, after: Agreed, round: int, local: Tensor, sent: Tensor | None
    ) -> Tensor:
        """The fragment's new local weights, from those of now.

        `sent` is what `local` was when it was sent, None where this peer was left out, whose change
        since `before` is then carried on.
        """
        ...
