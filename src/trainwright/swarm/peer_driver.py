"""The peer's own thread: it looks at the others, tells `rounds.tick` what it saw, and has done what
that calls for (`peer_duties`).

All state here is this thread's. What takes long goes out as errands and comes back as calls; what
the trainer is to have lies on the desk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from trainwright.swarm import rounds
from trainwright.swarm.events import Advanced, CardSeen, Decision, Event, Settled, Wake
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.peer_card import LONGEST, MOST_WANTS, Card, plain
from trainwright.swarm.peer_desk import Desk, Outcome
from trainwright.swarm.peer_duties import Duties
from trainwright.swarm.peer_errands import Errands
from trainwright.swarm.peer_memory import Memory, State
from trainwright.swarm.peer_shelves import SNAPSHOT, Shelves
from trainwright.swarm.transports.transport import TransportError

T = TypeVar("T")

_LONGEST_WAIT = 0.25  # seconds between two ticks
_SHORTEST_LOOK = 0.05  # seconds between two looks at the others
_PATIENCE = 1.0  # seconds between two tries, while there is nothing to begin with
_SELDOM = 10  # heartbeats between two looks at the cards of those long silent


@dataclass(frozen=True)
class Sight:
    """A card, and when it was first seen to be as it is."""

    card: Card
    changed: float


class Driver:
    """Runs until `stop`; what ends it otherwise is put on the desk."""

    def __init__(
        self,
        shelves: Shelves,
        memory: Memory,
        desk: Desk,
        manifest: Manifest,
        say: Callable[[str], None],
        name: str,
        version: str,
    ) -> None:
        self.shelves, self.memory, self.desk, self.manifest = shelves, memory, desk, manifest
        self.say, self.me = say, shelves.me
        self.errands = Errands()
        self.heartbeat = min(5.0, manifest.rules.silence / 10)
        self.card = Card(0, 0, "", name=plain(name, LONGEST), version=version)
        self.sights: dict[str, Sight] = {}
        self.active = False  # whether this peer contributes, once it has caught up
        self.leaving = False
        self.left = threading.Event()
        self.loss: float | None = None
        self.tokens = 0
        self.look = 0  # how often the others were looked at
        self._stopping = threading.Event()
        self._card_due = self._look_due = self._peers_due = self._dead_due = 0.0
        self._changed = time.monotonic()
        self._away = False
        self._register_empty = (-1, -1)  # round and attempt that were last found so
        self._caught_up = False
        self.rounds: rounds.Rounds
        self.duties: Duties

    def run(self) -> None:
        """What the thread does."""
        try:
            state = self._begin()
            if state is not None:
                self.duties = Duties(self, state)
                self.rounds = rounds.begin(
                    self.me, self.manifest.rules, self.duties.advanced(), time.monotonic()
                )
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:  # whatever it is, the trainer must not wait for ever
            self.memory.log("fault", what=repr(error))
            self.desk.fail(error)
            self.left.set()
        finally:
            self.errands.close()

    def stop(self) -> None:
        """End the thread soon; from any other."""
        self._stopping.set()
        self.errands.call(lambda: None)

    def tell(self, event: Event) -> None:
        """Something happened."""
        self.rounds, actions = rounds.tick(self.rounds, event, time.monotonic())
        if not isinstance(event, Wake | CardSeen):
            self.changed()
        for action in actions:
            self.duties.do(action)

    def changed(self) -> None:
        """Have the card rewritten, and look at the others again soon."""
        self._card_due = self._look_due = 0.0
        self._changed = time.monotonic()

    def alive(self) -> dict[str, Card]:
        """The cards of all that were heard of lately, this peer's among them."""
        now, silence = time.monotonic(), self.manifest.rules.silence
        sights = list(self.sights.items())  # at once: the trainer's thread asks too
        found = {p: each.card for p, each in sights if now - each.changed <= silence}
        return {**found, self.me: self.card}

    # Beginning

    def _begin(self) -> State | None:
        """The state to begin with: this peer's own, or the newest snapshot's if that is far ahead
        or there is no other. None if the peer is stopped before it has any.
        """
        state = self._own_state()
        before = self._patiently(lambda: self.shelves.card(self.me))
        self.card = replace(self.card, sequence=before.sequence if before else 0)
        while not self._stopping.is_set():
            found = self._patiently(partial(self._survey, state))
            state = found or state
            if state is not None:
                return state
            self.card = replace(self.card, sequence=self.card.sequence + 1, wants=(SNAPSHOT,))
            self._patiently(lambda: self.shelves.put_card(self.card))
            self._stopping.wait(_PATIENCE)
        return None

    def _own_state(self) -> State | None:
        """What is in this peer's directory, if its disk kept it as it was."""
        state = self.memory.load()
        if state and self.shelves.terms.hash(state.agreed, state.ledger) != state.base:
            self.memory.log("damaged", round=state.agreed.round)
            return None
        return state

    def _survey(self, state: State | None) -> State | None:
        """A newer state than this, where one is needed and to be had; on whatever thread."""
        have = state.agreed.round if state else -1
        far = have + rounds.FAR if state else 1
        cards: Mapping[str, Card] = self._others()
        if any(card.round >= far for card in cards.values()):  # then it matters who lives
            self._stopping.wait(2 * self.heartbeat)
            cards = self._heeded(cards, self._others())
        reached = sorted((card.round for card in cards.values()), reverse=True)
        front = reached[len(reached) // 2] if reached else 0  # by more than half
        return self.shelves.newest(cards, have, front) if not state or front >= far else None

    def _others(self) -> dict[str, Card]:
        """The cards of all others but those who have nothing to begin with either."""
        cards = {peer: self.shelves.card(peer) for peer in self.shelves.peers()}
        return {p: card for p, card in cards.items() if card and SNAPSHOT not in card.wants}

    def _heeded(self, before: Mapping[str, Card], now: Mapping[str, Card]) -> Mapping[str, Card]:
        """Whose word counts: those who wrote a new card between two looks. Where they are too few
        for a round, the run is over or at rest: then those who came as far as so many.
        """
        moved = {p for p, card in before.items() if p in now and now[p].sequence > card.sequence}
        quorum = self.manifest.rules.quorum
        if len(moved) >= quorum:
            return {peer: now[peer] for peer in moved}
        reached = sorted((card.round for card in now.values()), reverse=True)[:quorum]
        return {peer: card for peer, card in now.items() if card.round >= reached[-1]}

    def _patiently(self, work: Callable[[], T]) -> T | None:
        while not self._stopping.is_set():
            try:
                return work()
            except TransportError as error:
                self._note_away(str(error))
                self._stopping.wait(_PATIENCE)
        return None

    # One turn

    def _turn(self) -> None:
        now = time.monotonic()
        due = min(self._look_due, self._card_due) - now
        self.errands.deliver(min(max(due, 0.0), _LONGEST_WAIT))
        if time.monotonic() >= self._card_due:
            self._write_card()
        if time.monotonic() >= self._look_due:
            self._look_around()
        # What cannot be seen has not been silent, and is late for no deadline. A call that hangs
        # tells that later than one that fails, for over slow links calls take their time.
        hangs = self.errands.unanswered > self.rounds.nap
        if self.errands.away > self.heartbeat:
            self._note_away(self.errands.problem)
            return
        if hangs:
            self._note_away("nothing answers")
            return
        if self._away:
            self._away = False
            self.say("the run can be reached again")
            self.memory.log("back")
        self.tell(Wake())
        if not self._caught_up and self._is_current():
            self.duties.come_back()

    def _note_away(self, why: str) -> None:
        if not self._away:
            self._away = True
            self.say(f"the run cannot be reached, trying again: {why}")
            self.memory.log("away", why=why)

    def _is_current(self) -> bool:
        """Whether this peer has looked at everything, and nothing is decided that it lacks, unless
        nobody has that: only who takes part can give such a decision up.
        """
        here = self.rounds
        undecided = here.decision is None and self._register_empty == (here.round, here.attempt)
        stuck = any((each.peer, each.digest) in here.missing for each in here.lacking)
        return self.look > 1 and here.front is None and (undecided or stuck)

    def caught_up(self, offered: bool) -> None:
        """The trainer may begin; `offered`: for this round there is a contribution already."""
        self._caught_up = True
        self.desk.begin(self.duties.state.agreed, offered, self.duties.state.included)
        self.changed()

    # Cards

    def _write_card(self) -> None:
        """Tell the others how things are."""
        state, reports, upkeep = self.duties.state, self.duties.reports, self.duties.upkeep
        if self.errands.under_way("card"):
            return
        self._card_due = time.monotonic() + self.heartbeat
        last = self.leaving and not self.duties.publishing
        sent, received = self.shelves.transport.bytes_moved()
        up, down = self.shelves.rates
        self.card = card = replace(
            self.card,
            sequence=self.card.sequence + 1,
            round=state.agreed.round,
            base=state.base,
            active=self.active and self._caught_up and not last,
            leaving=last,
            ready=self.desk.ready,
            offered=self.duties.published,
            report=reports.digest,
            report_round=reports.round,
            snapshot=upkeep.snapshot,
            wants=tuple(sorted(self.duties.wants)[:MOST_WANTS]),
            loss=self.loss,
            tokens=self.tokens,
            sent=sent,
            received=received,
            rates=(round(up), round(down)) if up and down else None,
        )

        def written(_: object) -> None:
            self.tell(CardSeen(self.me, card.sequence, card.round, card.base, card.active))
            if last:
                self.left.set()

        self.errands.send("card", "small", lambda: self.shelves.put_card(card), written)

    def _look_around(self) -> None:
        """Look at the others' cards and at the round's register; often while something is due."""
        now = time.monotonic()
        pause = self.heartbeat
        if self.desk.waiting or self.duties.published or not self._caught_up:
            pause = min(pause, max(_SHORTEST_LOOK, (now - self._changed) / 2))
        self._look_due = now + pause
        if now >= self._peers_due or len(self.alive()) < self.manifest.rules.quorum:
            self._peers_due = now + self.heartbeat
            self.errands.send("peers", "small", self.shelves.peers, self._know)
        everybody = now >= self._dead_due
        for peer, sight in self.sights.items():
            if everybody or now - sight.changed < 3 * self.manifest.rules.silence:
                self._look_at(peer)
        if everybody:
            self._dead_due = now + _SELDOM * self.heartbeat
        self.look += 1
        attempt = rounds.unread(self.rounds, now)
        if attempt is not None:
            self.read_register(self.rounds.round, attempt)

    def _know(self, peers: list[str]) -> None:
        for peer in peers:
            if peer not in self.sights:
                self._look_at(peer)

    def _look_at(self, peer: str) -> None:
        look = self.look
        self.errands.send(
            ("card", peer),
            "small",
            lambda: self.shelves.card(peer),
            lambda card: self._saw(peer, card, look),
        )

    def _saw(self, peer: str, card: Card | None, look: int) -> None:
        if card is None:
            return
        old = self.sights.get(peer)
        if old is None or card.sequence > old.card.sequence:
            self.sights[peer] = Sight(card, time.monotonic())
            if old is None or (card.round, card.offered) != (old.card.round, old.card.offered):
                self._changed = time.monotonic()
        self.tell(CardSeen(peer, card.sequence, card.round, card.base, card.active))
        try:
            self.duties.heed(peer, card, look)
        except (OSError, ValueError) as error:  # whatever a stranger thinks of, it ends no peer
            self.memory.log("not heeded", peer=peer, what=repr(error))

    def read_register(self, round: int, attempt: int) -> None:
        """Look whether the round is decided."""

        def read(found: tuple[bool, Decision | None]) -> None:
            if self.rounds.base != base:
                return  # healed meanwhile: whom it excludes may be others now
            stands, decision = found
            if not stands:
                self._register_empty = (round, attempt)
                return
            self.tell(Settled(round, attempt, decision))
            following = rounds.unread(self.rounds, time.monotonic())
            if self.rounds.round == round and following not in (None, attempt):
                self.read_register(round, following)

        base = self.rounds.base
        excluded, key = self.duties.state.ledger.excluded, ("register", round, attempt)
        work = lambda: self.shelves.decision(round, attempt, excluded)  # noqa: E731
        self.errands.send(key, "small", work, read)

    # For the trainer

    def deliver(self, outcome: Outcome, advanced: Advanced) -> None:
        """The agreed state is another one now."""
        self.desk.deliver(outcome)
        self.tell(advanced)
