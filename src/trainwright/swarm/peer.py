"""A peer of a run: what the trainer calls, while a thread of its own does everything else.

    agreed = peer.start()                        # catches up; the weights to begin with
    steps, sent = 0, None                        # since the last offer; what was offered
    while training:
        train a step; steps += 1
        while (what := peer.wanted(steps)) != "go on":
            if what == "contribute" and peer.offer(local, tokens=…, steps=…, loss=…):
                steps, sent = 0, local
            elif what == "merge" and (outcome := peer.outcome()):
                weights, sent = outcome.merged(method, weights, sent), None
    peer.leave()
    peer.close()

The trainer's thread computes; the peer's own (`peer_driver`) reads and writes cards, contributions
and registers, and drives `swarm.rounds`. What takes long (transport, encoding, the outer step) is
done by a few more threads, so that no link and no vector stops the clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainwright import __version__
from trainwright.recipe.swarm import Swarm
from trainwright.swarm.identity import Identity
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.methods.method import Agreed, Method
from trainwright.swarm.peer_card import Card
from trainwright.swarm.peer_desk import Desk, Outcome, Wanted
from trainwright.swarm.peer_driver import Driver
from trainwright.swarm.peer_memory import Memory
from trainwright.swarm.peer_settle import Terms
from trainwright.swarm.peer_shelves import Shelves
from trainwright.swarm.scores import Evaluate, Score, try_contributions
from trainwright.swarm.settings import refuse_too_few_bytes
from trainwright.swarm.transports.transport import Transport

__all__ = ["Outcome", "Peer", "Status", "Wanted"]

_LAST_WORDS = 30.0  # seconds for a contribution under way and for the last card


@dataclass(frozen=True)
class Status:
    """How things are with a peer. `cards` are of all that were heard of lately, itself among them;
    `excluded` tells why, by peer; `waited` are the seconds that its trainer waited for outcomes.
    """

    round: int
    base: str
    cards: dict[str, Card]
    excluded: dict[str, str]
    sent: int
    received: int
    waited: float


class Peer:
    """One machine (or several, with rank 0 speaking for all) of a run.

    `directory` is this peer's own, on a local disk: what must outlive a crash is there. Alike on
    all peers must be `swarm` (the recipe's section), `rate` (the inner learning rate by round),
    `most_tokens` (that a contribution may claim) and `seed`. `say` prints a line for the user.

    Raises UserError where another process has the directory, or `max_bytes` is too few.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        manifest: Manifest,
        method: Method,
        swarm: Swarm,
        directory: Path,
        *,
        rate: Callable[[int], float],
        most_tokens: int,
        seed: int = 0,
        say: Callable[[str], None] = print,
        name: str = "",
    ) -> None:
        self.method, self.me = method, identity.peer
        refuse_too_few_bytes(swarm, method, manifest.settings.fragments)
        terms = Terms(manifest.run, method, swarm, rate, most_tokens, seed)
        self._memory = Memory(directory, manifest.run)
        self._desk = Desk(method.inner_steps, method.delay)
        shelves = Shelves(transport, identity, manifest, terms)
        self._driver = Driver(shelves, self._memory, self._desk, manifest, say, name, __version__)
        self._ended = 0.0  # when it was first asked whether it is still needed
        self._thread = threading.Thread(target=self._driver.run, name="swarm", daemon=True)

    def start(self, active: bool = True, wait: float | None = None) -> Agreed | None:
        """Begin, and catch up with the run: returns when this peer has what the others agree on.
        None after `wait` seconds without that; calling it again goes on waiting.

        `active` is False for one that never contributes: a validator, an export. The state's
        vectors are not to be changed.
        """
        if self._thread.ident is None:
            self._driver.active = active
            self._thread.start()
        return self._desk.caught_up(wait)

    @property
    def round(self) -> int:
        """The round that the trainer works on: outcomes of all before it were taken."""
        return self._desk.round

    @property
    def offered(self) -> bool:
        """Whether this round's contribution was given already, perhaps before a crash."""
        return self._desk.offered

    def wanted(self, steps: int) -> Wanted:
        """What is to be done after so many steps since the last offer, or since `start`.

        contribute  `inner_steps` are done, or the others wait for this peer: `offer` now
        merge       an outcome is here or, `delay` steps after an offer, has to be waited for:
                    `outcome` now
        go on       nothing: train
        """
        return self._desk.wanted(steps)

    def offer(self, local: Tensor, tokens: int, steps: int, loss: float) -> bool:
        """Give this round's contribution: fp32, this peer's part of `method.fragment(peer.round)`
        (its weights now, or its gradient), not to be changed afterwards. Returns at once.

        `tokens` and `steps` since the last contribution that was taken in, and their mean loss.
        False where it comes too late: the round is over, and its outcome is to be taken first.
        """
        driver = self._driver

        def send(round: int) -> None:
            driver.errands.call(lambda: driver.duties.offer(round, local, tokens, steps, loss))

        return self._desk.offer(send)

    def outcome(self, wait: float | None = None) -> Outcome | None:
        """The oldest outcome that was not taken yet. Waits so many seconds for it, with None until
        there is one; None if there is none. Raises what ended the peer's thread, if anything did.
        """
        return self._desk.outcome(wait)

    @property
    def trial_round(self) -> int | None:
        """The round whose contributions this peer is to `score`; None where there is none."""
        trial = self._driver.duties.trial
        return trial.round if trial is not None else None

    def score(self, evaluate: Evaluate) -> dict[str, Score]:
        """Try on data the contributions that this peer is to try, and publish what came of it: on
        the caller's thread, three evaluations for each and one more. Empty if there are none.
        """
        duties = self._driver.duties
        trial, duties.trial = duties.trial, None
        if trial is None:
            return {}
        chosen = [each.peer for each in trial.received]
        scores = try_contributions(
            self.method, trial.agreed, trial.received, trial.rate, evaluate, chosen
        )
        self._driver.errands.call(lambda: duties.reports.tell(trial.round, scores))
        return scores

    @property
    def status(self) -> Status:
        """How things are, once `start` has returned."""
        driver = self._driver
        state = driver.duties.state
        excluded = {peer: state.ledger.of(peer).excluded for peer in state.ledger.excluded}
        sent, received = driver.shelves.transport.bytes_moved()
        return Status(
            state.agreed.round,
            state.base,
            driver.alive(),
            excluded,
            sent,
            received,
            self._desk.waited,
        )

    def save(self) -> None:
        """Make agreed and own state durable now, and what the state will be that is under way; to
        be called with the trainer's checkpoints.
        """
        duties = self._driver.duties
        if (offered := duties.offered) is not None and offered.after is not None:
            self._memory.keep_offered(offered)
        self._memory.save(duties.state)

    def go_back(self, round: int) -> bool:
        """Let the trainer be in `round` still, which was over before it began and took in what this
        peer had offered: its outcome is to be merged, with the agreed state after it as the one
        before. False if it is not that round which the run has come from.
        """
        return self._desk.go_back(round)

    @property
    def needed(self) -> bool:
        """Whether others still lack what goes away with this peer, when it ends: over a ring
        objects are with their owners. For half a deadline at most, in which a round is over.
        """
        driver, now = self._driver, time.monotonic()
        if driver.shelves.transport.stays:
            return False
        self._ended = self._ended or now
        if now > self._ended + driver.manifest.rules.deadline / 2:
            return False
        here, others = driver.duties.state.agreed.round, driver.alive()
        return any(card.round < here for peer, card in others.items() if peer != self.me)

    def leave(self) -> None:
        """Tell the others that this peer goes; a contribution under way is still delivered."""
        if self._thread.is_alive() and hasattr(self._driver, "rounds"):  # or it never came in
            self._driver.leaving = True
            self._driver.errands.call(self._driver.changed)
            self._driver.left.wait(_LAST_WORDS)

    def close(self) -> None:
        """End all threads, then save. The transport is the caller's to close."""
        if self._thread.ident is not None:
            self._driver.stop()
            self._thread.join()
            if hasattr(self._driver, "duties"):
                self.save()
        self._memory.close()
