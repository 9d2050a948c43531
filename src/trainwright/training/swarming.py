"""A run's trainer as one peer of a swarm: exchanges with the others between its steps.

The first worker has the `Peer`, whose threads do all that takes a network. After every step it says
what is to be done, and all workers do it together: gather the weights for a contribution, take up
agreed ones, try others' contributions on data. While it waits it says so once a second, so that no
worker takes another for dead.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainwright.data.batches import Batches
from trainwright.objectives.objective import Objective
from trainwright.optim.held import HeldGradients
from trainwright.parallel.spread import SpreadModel
from trainwright.swarm.layout import Layout, take
from trainwright.swarm.methods.method import Method
from trainwright.swarm.peer import Outcome, Peer
from trainwright.training.evaluate import batch_loss
from trainwright.training.gathering import Gathering
from trainwright.training.loop import Trainer
from trainwright.training.metrics import MetricsWriter
from trainwright.training.step import StepStats

# What the first worker says to the others.
_GO_ON, _WAIT, _CONTRIBUTE, _MERGE, _TRY, _LOSS, _STOP = range(7)
_WAIT_SECONDS = 1.0
_LONG_WAIT = 5.0
_FAREWELL = 10.0  # seconds that a peer that is stopped goes on serving what others lack


@dataclass(frozen=True)
class Work:
    """Steps, trained targets, and the sum of the steps' losses."""

    steps: int = 0
    tokens: int = 0
    losses: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps, self.tokens + other.tokens, self.losses + other.losses
        )


@dataclass(frozen=True)
class Place:
    """Where a peer is in the run: the round, its steps since the last offer, and all the work that
    no agreed round has taken in yet.
    """

    round: int = 0
    steps: int = 0
    work: Work = Work()


def data_seed(seed: int, peer: str | None) -> int:
    """The seed of a peer's order of rows: everybody can tell what it was to train on in a round.

    None is an order that nobody trains in.
    """
    digest = hashlib.sha256(f"{seed}:{peer or 'nobody'}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class SwarmHook:
    """Comes before evaluation and checkpoints, which then see what was agreed.

    `peer` is set on the first worker, and None on all others. `held` has the gradients, for methods
    that exchange those. `data_of` opens the training data in the order of a peer, or of nobody.
    """

    def __init__(
        self,
        trainer: Trainer,
        spread: SpreadModel,
        objective: Objective,
        method_of: Callable[[Layout], Method],
        *,
        held: HeldGradients | None,
        data_of: Callable[[str | None], Batches],
        quorum: int,
        writer: MetricsWriter | None,
        say: Callable[[str], None],
    ) -> None:
        self.quorum, self.say, self.waited = quorum, say, 0.0
        self.trainer = trainer
        self.world = spread.mesh.world
        self.gathering = Gathering(spread)
        self.method, self.held = method_of(self.gathering.layout), held
        self.peer: Peer | None = None
        self.writer = writer
        self.losses = Losses(spread, objective, data_of, self.method.inner_steps)
        self.place = Place()
        # Of the first worker: what was offered and is not decided yet, and what was agreed last.
        self.sent: Tensor | None = None
        self.offered: Work | None = None
        self.outcome: Outcome | None = None
        self.agreed: Tensor | None = None

    # Beginning

    def begin(
        self, saved: Place | None, sent: Tensor | None, offered: Work | None, step: int
    ) -> int:
        """Catch up with the run, and take up its weights; the step to go on with.

        A checkpoint of the round that the run is in, `saved` after `step`, is gone on from as it
        was: with what had been `sent` then, and the work that was `offered` with it. So is one of
        the round before where steps go on during an exchange, which ended only meanwhile.
        """
        agreed = None
        while True:
            if self.peer is not None:
                agreed = self.peer.start(wait=_WAIT_SECONDS)
            if self._say(_WAIT if agreed is None else _GO_ON) == _GO_ON:
                break
        self.agreed = agreed.weights if agreed is not None else None
        round = self._say(agreed.round if agreed is not None else 0)
        # What was offered after that checkpoint has a part of its change in it already.
        since = self._say(int(self.peer is not None and self.peer.offered and sent is None))
        same = saved is not None and saved.round == round and not since
        if saved is not None and offered is not None and self.method.delay and not same:
            back = self.peer is not None and self.peer.go_back(saved.round)
            same = bool(self._say(int(back)))
        if saved is not None and same:
            self.place, self.sent, self.offered = saved, sent, offered
            self._see_to_wants(last=step >= self.trainer.total_steps)
        else:
            self.gathering.put_back(self.agreed)
            self.place, step = Place(round), 0
        return max(step, self.place.round * self.method.inner_steps + self.place.steps)

    # After each step

    def after_step(self, done: int, stats: StepStats, seconds: float, last: bool) -> None:
        """Whatever the peer wants now; at the end, all that is still under way."""
        if stats.skipped and self.held is not None:
            self.held.held = {}  # what it holds was sent before
        work = self.place.work + Work(1, stats.targets, stats.loss)
        self.place = replace(self.place, steps=self.place.steps + 1, work=work)
        stopping = stats.stop_requested
        if not stopping and self._see_to_wants(last):
            self.trainer.unfinished = stopping = True
        # Steps that a slow peer has not reached are skipped.
        next_index = max(done, self.place.round * self.method.inner_steps + self.place.steps)
        # The last step always comes: all hooks are to see it.
        self.trainer.next_index = min(next_index, self.trainer.total_steps - (not last))
        if last or stopping:
            if not stopping:
                self.gathering.put_back(self.agreed)
            self._see_others_off(stopping)
            if self.peer is not None:
                self.peer.leave()

    def _see_to_wants(self, last: bool) -> bool:
        """Do what the peer wants until it wants another step; whether somebody asked to stop
        before that. What is wanted then is seen to when the run goes on.
        """
        while (wanted := self._wanted(last)) not in (_GO_ON, _STOP):
            if wanted == _CONTRIBUTE:
                self._contribute()
            elif wanted == _MERGE:
                self._merge()
            elif wanted == _TRY:
                self._try()
        return wanted == _STOP

    def _wanted(self, last: bool) -> int:
        """What all workers do next, as the first one's peer says."""
        if self.place.round * self.method.inner_steps >= self.trainer.total_steps:
            return _GO_ON  # nobody else takes part in a round after the last
        code = _GO_ON
        if self.peer is not None and self.trainer.stop_requested:
            code = _STOP
        elif self.peer is not None:
            wanted: str = self.peer.wanted(self.place.steps)
            if wanted == "go on" and last:
                # There is nothing more to compute beside it, or to make it longer.
                rest = "contribute" if self.place.steps else "go on"
                wanted = "merge" if self.offered is not None else rest
            if wanted == "contribute":
                code = _CONTRIBUTE
            elif wanted == "merge":
                self.outcome = self.peer.outcome(wait=_WAIT_SECONDS)
                code = _WAIT if self.outcome is None else _MERGE
                self._tell_waiting(code == _WAIT)
            elif self.peer.trial_round is not None:
                code = _TRY
        return self._say(code)

    def _see_others_off(self, stopping: bool) -> None:
        """Stay until the others have all that they can only have of here: at the end of the run
        until this peer is asked to stop, and where it is stopped before that, for some seconds.
        """
        stays, waited = False, 0.0
        while True:
            if self.peer is not None:
                patient = waited < _FAREWELL if stopping else not self.trainer.stop_requested
                stays = self.peer.needed and patient
            if self._say(_WAIT if stays else _GO_ON) == _GO_ON:
                break
            if self.peer is not None:
                if waited == (0.0 if stopping else _LONG_WAIT):
                    self.say("others still fetch from here what was decided last")
                time.sleep(_WAIT_SECONDS)
                waited += _WAIT_SECONDS

    def _tell_waiting(self, waits: bool) -> None:
        """A line for the user where the others take long."""
        self.waited = self.waited + _WAIT_SECONDS if waits else 0.0
        if self.waited == _LONG_WAIT and self.peer is not None:
            status = self.peer.status
            others = [card for peer, card in status.cards.items() if card.active]
            there = "1 peer is" if len(others) == 1 else f"{len(others)} peers are"
            self.say(
                f"round {status.round} waits for others: {there} there, "
                f"{self.quorum} contributions are needed"
            )

    def _say(self, code: int) -> int:
        """The first worker's `code`, on all workers."""
        return self.world.first_workers([code])[0]

    def _contribute(self) -> None:
        local, given = self._local(), False
        if self.peer is not None and local is not None:
            part = take(local, self.method.fragment(self.peer.round))
            work = self.place.work
            given = self.peer.offer(part, work.tokens, work.steps, work.losses / work.steps)
            if given:
                self.sent, self.offered = part, work
        # Too late: the round is over, and what it did not take in is carried on.
        given = bool(self._say(int(given)))
        if given:
            self.place = replace(self.place, steps=0, work=Work())

    def _local(self) -> Tensor | None:
        if self.held is not None:
            return self.gathering.gradients(self.held.held)
        return self.gathering.weights()

    def _merge(self) -> None:
        local = self.gathering.weights()
        merged, place = None, self.place
        if self.peer is not None and local is not None:
            outcome = self.outcome
            assert outcome is not None
            merged, self.agreed = (
                outcome.merged(self.method, local, self.sent),
                outcome.after.weights,
            )
            work = place.work
            if self.offered is not None and not (outcome.included or outcome.replaced):
                work += self.offered  # it is carried on
            place = Place(self.peer.round, place.steps, work)
            if outcome.replaced:  # all that was trained since is gone
                place = Place(self.peer.round)
            self.sent = self.offered = None
            self._record(outcome)
        self.gathering.put_back(merged)
        round, steps = self.world.first_workers([place.round, place.steps])
        self.place = replace(place, round=round, steps=steps)

    def _record(self, outcome: Outcome) -> None:
        assert self.peer is not None
        status = self.peer.status
        record = {
            "kind": "round",
            "step": outcome.after.round * self.method.inner_steps,
            "round": outcome.round,
            "included": outcome.included,
            "failed": outcome.failed,
            "replaced": outcome.replaced,
            "reason": outcome.reason,
            "peers": len(status.cards),
            "sent": status.sent,
            "received": status.received,
            "waited": status.waited,
        }
        if self.writer is not None:
            self.writer.write(record)

    # Trying others' contributions

    def _try(self) -> None:
        """Losses of others' contributions; workers without the peer are told what to compute."""
        kept = self.gathering.weights()
        if self.peer is not None:
            round = self.peer.trial_round or 0
            self.peer.score(lambda weights, peer: self._loss(weights, peer, round))
            self._say(_GO_ON)
        else:
            while self._say(_GO_ON) == _LOSS:
                self._loss(None, None, 0)
        self.gathering.put_back(kept)

    def _loss(self, weights: Tensor | None, peer: str | None, round: int) -> float:
        """Of `weights` on the first batch of a peer's round, on all workers."""
        if self.peer is not None:
            self._say(_LOSS)
        # Ids are 80 bits, and a worker is told 63 at once.
        number = int(peer, 16) if peer is not None else 0
        told = [round, int(peer is not None), number >> 40, number & ((1 << 40) - 1)]
        round, known, high, low = self.world.first_workers(told)
        self.gathering.put_back(weights)
        return self.losses(f"{(high << 40) + low:020x}" if known else None, round)


class Losses:
    """Losses of the model as it is, on what a peer was given in a round, or on what nobody was.

    `data_of` opens the training data in the order of a peer, or of nobody.
    """

    def __init__(
        self,
        spread: SpreadModel,
        objective: Objective,
        data_of: Callable[[str | None], Batches],
        inner_steps: int,
    ) -> None:
        self.spread, self.objective = spread, objective
        self.data_of, self.inner_steps = data_of, inner_steps

    def __call__(self, peer: str | None, round: int) -> float:
        """On the first batch of that round's. Collective."""
        rows = self.spread.plan.rows_of(self.spread.mesh.index("data"))
        batch = self.data_of(peer).batch(round * self.inner_steps, rows)
        with torch.no_grad():
            return batch_loss(
                self.spread, self.objective, batch, micro_batch=self.spread.plan.micro_batch
            )
