"""A swarm in one process, without links: methods and codecs alone, step by step.

For benchmarks and tests of what methods do to learning. Every peer trains its own weights, and
contributions go through their codecs as they would between machines; nobody waits, and who is left
out of a round is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trainwright.swarm.layout import put, take
from trainwright.swarm.methods.method import Agreed, Method, Own, Received


class Trainee(Protocol):
    """One peer's model and data. Weights and gradients are fp32 [count] on the CPU."""

    def load(self, weights: Tensor) -> None:
        """Take up these weights."""
        ...

    def weights(self) -> Tensor:
        """The weights now, a copy."""
        ...

    def train(self, step: int) -> int:
        """One step of the inner optimizer; the tokens that it saw."""
        ...

    def gradient(self, step: int) -> tuple[Tensor, int]:
        """The gradient of a step's batch, and its tokens; the weights stay."""
        ...


@dataclass
class Sent:
    """A round under way: it is merged when `due` steps are done."""

    round: int
    due: int
    before: Mapping[str, Agreed]
    after: Mapping[str, Agreed]
    local: Mapping[str, Tensor]  # by those whom the round takes in
    own: Mapping[str, Own]  # by peer, from then on


Attends = Callable[[int, str], bool]
Judge = Callable[[int, list[Received]], list[Received]]


class Rehearsal:
    """Peers of a method, by name. `rate` is the inner learning rate of a step.

    `attends(round, peer)` says whom a round takes in, default all; `judge(round, received)` what is
    made of contributions before they are combined, default nothing. A round of nobody fails.
    """

    def __init__(
        self,
        method: Method,
        trainees: Mapping[str, Trainee],
        genesis: Tensor,
        *,
        rate: Callable[[int], float],
        seed: int = 0,
        attends: Attends = lambda round, peer: True,
        judge: Judge = lambda round, received: received,
    ) -> None:
        self.method, self.trainees, self.rate = method, dict(sorted(trainees.items())), rate
        self.seed, self.attends, self.judge = seed, attends, judge
        self.step = 0
        self.agreed = {peer: Agreed(0, genesis.clone()) for peer in self.trainees}
        self.own = {peer: method.begin(self.agreed[peer]) for peer in self.trainees}
        self.tokens = dict.fromkeys(self.trainees, 0)  # since a round took the peer in
        self.sent: Sent | None = None
        self.bytes = 0  # of all contributions so far
        for trainee in self.trainees.values():
            trainee.load(genesis)

    @property
    def round(self) -> int:
        """The round that comes next."""
        return next(iter(self.agreed.values())).round

    def run(self, steps: int) -> None:
        """Train on until so many steps are done in all."""
        while self.step < steps:
            gradients = {}
            for peer, trainee in self.trainees.items():
                if self.method.takes == "weights":
                    tokens = trainee.train(self.step)
                else:
                    gradients[peer], tokens = trainee.gradient(self.step)
                self.tokens[peer] += tokens
            self.step += 1
            self._merge()
            if self.step % self.method.inner_steps == 0:
                self._exchange(gradients)
                self._merge()

    def _exchange(self, gradients: Mapping[str, Tensor]) -> None:
        """One round: everybody's contribution, what is agreed, and when it is merged."""
        method, number = self.method, self.round
        part = method.fragment(number)
        rate = self.rate(self.step - 1)
        received, own, local = [], {}, {}
        for peer, trainee in self.trainees.items():
            values = gradients[peer] if gradients else take(trainee.weights(), part)
            given = (self.agreed[peer], self.own[peer], number, values, rate)
            if not self.attends(number, peer):
                own[peer] = method.missed(*given)
                continue
            planes, own[peer] = method.outgoing(*given)
            self.bytes += sum(map(len, planes))
            local[peer] = values
            weight = float(self.tokens[peer])
            received.append(Received(peer, method.decode(planes, number), weight))
            self.tokens[peer] = 0
        after = self._advance(self.judge(number, received), rate)
        self.sent = Sent(number, self.step + method.delay, self.agreed, after, local, own)
        self.agreed = after

    def _advance(self, received: list[Received], rate: float) -> dict[str, Agreed]:
        method = self.method
        if method.agrees:
            after = method.advance(next(iter(self.agreed.values())), received, rate)
            return dict.fromkeys(self.agreed, after)
        found = {}
        members = [each.peer for each in received]
        for peer, agreed in self.agreed.items():
            wanted = (
                method.partners(self.round, members, peer, self.seed) if peer in members else []
            )
            heard = [each for each in received if each.peer in wanted]
            found[peer] = method.advance(agreed, heard, rate)
        return found

    def _merge(self) -> None:
        """Take up the outcome of the round under way, when it is time."""
        sent = self.sent
        if sent is None or self.step < sent.due:
            return
        part = self.method.fragment(sent.round)
        for peer, trainee in self.trainees.items():
            weights = trainee.weights()
            merged = self.method.merge(
                sent.before[peer],
                sent.after[peer],
                sent.round,
                take(weights, part),
                sent.local.get(peer),
            )
            put(weights, part, merged)
            trainee.load(weights)
        self.own, self.sent = dict(sent.own), None

    def state(self) -> dict[str, Any]:
        """All but the trainees: what `restore` takes."""
        names = ("step", "agreed", "own", "tokens", "sent", "bytes")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the trainees' own states are the caller's."""
        for name, value in state.items():
            setattr(self, name, value)
