"""A simulated world for `swarm.rounds`: peers with clocks of their own, a store, faults.

A discrete-event simulation: a heap of (time, what happens). A peer here does what `peer.py` does
for real (looks around, fetches, proposes, advances), with seconds taken from a seeded generator in
place of a network, and a chain of hashes in place of weights: `base` names all that was agreed
before, so two peers with the same base have decided the same things.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from trainwright.swarm.events import (
    Advance,
    Advanced,
    Arrived,
    CardSeen,
    CatchUp,
    Decision,
    Event,
    Fetch,
    Heal,
    Hurry,
    Missing,
    Offered,
    Propose,
    ReportArrived,
    Rules,
    Settled,
    Wake,
)
from trainwright.swarm.rounds import begin, tick, unread
from trainwright.swarm.rounds_state import Rounds

GENESIS = "genesis"
GARBAGE = "garbage"


def chained(base: str, decision: Decision) -> str:
    """The hash of what is agreed after a decision."""
    said = repr((base, decision.round, decision.entries, decision.reports))
    return hashlib.sha256(said.encode()).hexdigest()[:12]


@dataclass
class World:
    """The store, the time, and all peers. `lasting`: a dead peer's objects can still be read."""

    rules: Rules
    random: random.Random
    lasting: bool = True
    keeps: int = 1000  # rounds whose contributions stay on the shelves
    now: float = 0.0
    peers: dict[str, Peer] = field(default_factory=dict)
    registers: dict[tuple[int, int], Decision | str] = field(default_factory=dict)
    settled_at: dict[int, float] = field(default_factory=dict)
    happenings: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    count: int = 0

    def at(self, moment: float, happens: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.happenings, (moment, self.count, happens))

    def run(self, until: float) -> None:
        while self.happenings and self.happenings[0][0] <= until:
            self.now, _, happens = heapq.heappop(self.happenings)
            happens()
        self.now = until

    def settle(self, round: int, attempt: int, value: Decision | str) -> Decision | str:
        """Write-once: the first value stays."""
        self.settled_at.setdefault(round, self.now)
        return self.registers.setdefault((round, attempt), value)


@dataclass
class Contribution:
    """An object on a shelf; `seen_at`: when a reader first finds it there."""

    round: int
    digest: str
    base: str
    seen_at: float


class Peer:
    """A process. All of its seconds are drawn once, so that peers are alike or unlike for good.

    train     seconds of training a round        upload   seconds to put a contribution
    fetch     seconds to get one                 poll     seconds between two looks around
    call      seconds of a small request         compute  seconds of an outer step
    """

    def __init__(
        self,
        world: World,
        name: str,
        *,
        train: float = 10.0,
        upload: float = 1.0,
        fetch: float = 0.5,
        poll: float = 0.5,
        call: float = 0.05,
        compute: float = 0.2,
        snapshot: float = 2.0,
        drift: float = 1.0,
        blocking: bool = False,
        trains: bool = True,
    ) -> None:
        self.world, self.name = world, name
        self.train, self.upload, self.fetch = train, upload, fetch
        self.poll, self.call, self.compute, self.snapshot = poll, call, compute, snapshot
        self.drift, self.offset = drift, world.random.uniform(-1e6, 1e6)
        self.blocking, self.trains = blocking, trains
        self.life = 0  # grows when the process dies: what it had begun comes to nothing
        self.up, self.stopped, self.away = False, 0.0, 0.0
        self.blind: dict[str, float] = {}  # whose shelf cannot be reached, until when
        self.state: Rounds | None = None
        self.wrong_next = False  # a fault in memory: the next outer step comes out wrong
        # On its shelf, and on its disk:
        self.cards: list[tuple[float, CardSeen]] = []
        self.sequence = 0
        self.contributions: dict[int, Contribution] = {}
        self.scores: dict[str, Contribution] = {}
        self.copies: dict[str, Contribution] = {}  # of others' objects, by digest
        self.saved = Advanced(0, GENESIS, ())
        # What the test looks at:
        self.bases: dict[int, str] = {0: GENESIS}
        self.decisions: dict[int, Decision] = {}
        self.entered: dict[int, float] = {}
        self.hurried: list[int] = []
        self.healed: list[tuple[int, str]] = []
        self.caught_up: list[tuple[int, int]] = []
        self.actions: list[tuple[float, object]] = []
        world.peers[name] = self

    # Time

    @property
    def clock(self) -> float:
        return self.world.now * self.drift + self.offset

    def seconds(self, mean: float) -> float:
        return mean * self.world.random.uniform(0.7, 1.4)

    def later(self, seconds: float, happens: Callable[[], None]) -> None:
        """When this process gets to it: never, if it dies; after it goes on, if it is stopped."""
        life = self.life

        def reached() -> None:
            if life != self.life:
                return
            if self.stopped > self.world.now:
                self.world.at(self.stopped, reached)
            else:
                happens()

        self.world.at(self.world.now + seconds, reached)

    # Faults

    def start(self) -> None:
        """Begin, or begin again with what is on the disk."""
        if self.up:
            return
        self.life += 1
        self.up, self.current, self.doing = True, False, set[object]()
        self.told: dict[str, int] = {}  # cards' sequences by peer; reports
        self.state = begin(self.name, self.world.rules, self.saved, self.clock)
        self._enter()
        self.look()
        self._write_card()

    def kill(self) -> None:
        """SIGKILL."""
        self.life += 1
        self.up, self.state = False, None

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT so much later."""
        self.stopped = max(self.stopped, self.world.now + seconds)

    @property
    def active(self) -> bool:
        """Trains, and has caught up."""
        return self.trains and self.current

    # The driver

    def look(self) -> None:
        """See everything there is to see, then wake."""
        self.later(self.seconds(self.poll), self.look)
        busy = self.blocking and any(isinstance(each, Advance) for each in self.doing)
        if busy or self.away > self.world.now:
            return
        for peer in list(self.world.peers.values()):
            self._look_at_card(peer)
            self._look_at_shelf(peer)
        self._read_register()
        self.tick(Wake())
        if not self.current and self.state.front is None and self.state.decision is None:
            self.current = True
            self._enter()

    def _reaches(self, peer: Peer) -> bool:
        there = peer.up and peer.away <= self.world.now
        hidden = self.blind.get(peer.name, 0.0) > self.world.now
        return peer is self or (not hidden and (self.world.lasting or there))

    def _look_at_card(self, peer: Peer) -> None:
        if not self._reaches(peer):
            return
        for seen_at, card in reversed(peer.cards):
            if seen_at <= self.world.now:
                if self.told.get(peer.name) != card.sequence:
                    self.told[peer.name] = card.sequence
                    self.tick(card)
                return

    def _look_at_shelf(self, peer: Peer) -> None:
        if peer is self or not self._reaches(peer):
            return
        found = peer.contributions.get(self.state.round)
        if found and found.seen_at <= self.world.now:
            self._get(Fetch(self.state.round, peer.name, found.digest))
        for digest, report in peer.scores.items():
            if report.seen_at <= self.world.now and digest not in self.told:
                self.told[digest] = 1
                self.copies[digest] = report
                self.tick(ReportArrived(peer.name, digest))

    def _read_register(self) -> None:
        while (attempt := unread(self.state, self.clock)) is not None:
            found = self.world.registers.get((self.state.round, attempt))
            if found is None:
                return
            before = self.state
            self.tick(Settled(self.state.round, attempt, None if found == GARBAGE else found))
            if self.state is before:
                return

    def tick(self, event: Event) -> None:
        self.state, actions = tick(self.state, event, self.clock)
        for action in actions:
            self.do(action)

    def do(self, action: object) -> None:
        key = type(action) if isinstance(action, (Propose, CatchUp, Heal)) else action
        if isinstance(action, Fetch):
            return self._get(action)
        if key in self.doing:
            return None
        self.actions.append((self.world.now, action))
        match action:
            case Propose(attempt, decision):
                self.doing.add(key)
                self._settle(key, attempt, decision)
            case Advance(decision):
                self.doing.add(key)
                round = self.state.round
                self.later(self.seconds(self.compute), lambda: self._advance(key, round, decision))
            case Hurry(round):
                if round not in self.hurried:
                    self.hurried.append(round)
                    self._contribute(round)
            case CatchUp(to, holders):
                self._take_up(key, holders, lambda state: state.round >= to)
            case Heal(round, base, holders):
                self._take_up(key, holders, lambda state: state.base == base)
        return None

    def _settle(self, key: object, attempt: int, decision: Decision) -> None:
        """The request is on its way: it arrives even if this process dies or is stopped."""
        value, round, sent = (
            self.proposal(attempt, decision),
            decision.round,
            self.seconds(self.call),
        )

        def answered() -> None:
            self.doing.discard(key)
            if self.away <= self.world.now:
                found = self.world.registers[round, attempt]
                self.tick(Settled(round, attempt, None if found == GARBAGE else found))

        if self.away <= self.world.now:
            self.world.at(self.world.now + sent, lambda: self.world.settle(round, attempt, value))
            self.later(2 * sent, answered)
        else:
            self.later(1.0, lambda: self.doing.discard(key))

    def proposal(self, attempt: int, decision: Decision) -> Decision | str:
        return decision

    def _get(self, wanted: Fetch) -> None:
        here = (wanted.peer, wanted.digest)
        if wanted in self.doing or (here in self.state.here and not wanted.report):
            return
        self.doing.add(wanted)
        self.later(
            self.seconds(self.call if wanted.report else self.fetch), lambda: self._got(wanted)
        )

    def _got(self, wanted: Fetch) -> None:
        self.doing.discard(wanted)
        if wanted.round != self.state.round or self.away > self.world.now:
            return
        owner = self.world.peers[wanted.peer]
        reached = [each for each in self.world.peers.values() if self._reaches(each)]
        found = self._find(wanted, [owner]) if owner in reached else None
        found = found or self._find(wanted, reached)  # a copy, from whoever has one
        if found is None:
            if owner in reached:
                self.tick(Missing(wanted.round, wanted.peer, wanted.digest))
        elif wanted.report:
            self.copies[wanted.digest] = found
            self.tick(ReportArrived(wanted.peer, wanted.digest))
        else:
            self.copies[wanted.digest] = found
            wrong = "" if found.base == self.state.base else "it starts from other weights"
            self.tick(Arrived(wanted.round, wanted.peer, wanted.digest, wrong))

    def _find(self, wanted: Fetch, peers: list[Peer]) -> Contribution | None:
        for peer in peers:
            own = peer.scores.values() if wanted.report else peer.contributions.values()
            shelf = own if peer.name == wanted.peer else peer.copies.values()
            for each in shelf:
                if each.digest == wanted.digest:
                    return each
        return None

    def _advance(self, key: object, round: int, decision: Decision) -> None:
        self.doing.discard(key)
        if self.state.round != round or self.state.decision != decision:
            return
        started = Counter(self.copies[digest].base for _, digest in decision.entries)
        most = max(started, key=lambda each: started[each], default=self.state.base)
        if 2 * started[most] > len(decision.entries) and most != self.state.base:
            # What was decided was made from other weights than this peer's.
            holders = tuple(p.name for p in self.world.peers.values() if p.bases.get(round) == most)
            self._take_up(Heal, holders, lambda state: True)
            return
        base = chained(self.state.base, decision)
        if self.wrong_next:
            self.wrong_next, base = False, f"wrong-{self.name}"
        electorate = tuple(p for p, _ in decision.entries) or self.state.electorate
        self.decisions[round] = decision
        self._become(Advanced(round + 1, base, electorate))

    def _take_up(
        self, key: object, holders: tuple[str, ...], fits: Callable[[Rounds], bool]
    ) -> None:
        peers = [self.world.peers[name] for name in holders]
        states = [each.state for each in peers if each.state and self._reaches(each)]
        states = [each for each in states if fits(each)]
        if not states or key in self.doing:
            return
        counts = Counter((each.round, each.base) for each in states)
        most = max(counts, key=lambda each: (counts[each], each))
        found = next(each for each in states if (each.round, each.base) == most)
        self.doing.add(key)
        self.later(self.seconds(self.snapshot), lambda: self._took_up(key, found))

    def _took_up(self, key: object, found: Rounds) -> None:
        self.doing.discard(key)
        if self.away > self.world.now:
            return
        if key is Heal:
            self.healed.append((self.state.round, found.base))
        else:
            self.caught_up.append((self.state.round, found.round))
        self._become(Advanced(found.round, found.base, found.electorate))

    def _become(self, advanced: Advanced) -> None:
        self.saved = advanced
        self.tick(advanced)
        self._enter()
        self._write_card(again=False)

    def _enter(self) -> None:
        """A new round: train for it."""
        round = self.state.round
        self.bases[round] = self.state.base
        self.entered[round] = self.world.now
        for shelf in (self.contributions, self.scores, self.copies):
            for old in [
                key for key, each in shelf.items() if each.round < round - self.world.keeps
            ]:
                del shelf[old]
        own = self.contributions.get(round)
        if own and own.base == self.state.base:
            self.tick(Offered(round, own.digest))  # from before a crash
        elif self.active:
            self.later(self.seconds(self.train), lambda: self._contribute(round))

    def _contribute(self, round: int) -> None:
        if not self.trains or self.state.round != round or ("upload", round) in self.doing:
            return
        self.doing.add(("upload", round))
        base = self.state.base
        self.later(self.seconds(self.upload), lambda: self._uploaded(round, base))

    def _uploaded(self, round: int, base: str) -> None:
        if self.away > self.world.now:  # once more
            self.later(1.0, lambda: self._uploaded(round, base))
            return
        self.doing.discard(("upload", round))
        if self.state.round == round and self.state.base == base:
            digest = f"{self.name}:{round}:{self.life}:{base[:4]}"
            seen = self.world.now + self.seconds(self.call)
            self.contributions[round] = Contribution(round, digest, base, seen)
            self.copies[digest] = self.contributions[round]
            self.tick(Offered(round, digest))
            report = f"scores:{self.name}:{round}"
            self.scores[report] = Contribution(round, report, base, seen)
            self.tick(ReportArrived(self.name, report))

    def _write_card(self, again: bool = True) -> None:
        if again:
            self.later(2.0, self._write_card)
        if self.away > self.world.now:
            return
        self.sequence += 1
        card = self.card()
        self.cards = [*self.cards[-2:], (self.world.now + self.seconds(self.call), card)]

    def card(self) -> CardSeen:
        return CardSeen(self.name, self.sequence, self.state.round, self.state.base, self.active)


# Liars


class FarCard(Peer):
    """Says that it is a million rounds ahead."""

    def card(self) -> CardSeen:
        return CardSeen(self.name, self.sequence, 1_000_000, "far", True)


class WrongCard(Peer):
    """Says that it has other weights."""

    def card(self) -> CardSeen:
        return CardSeen(self.name, self.sequence, self.state.round, "mine", True)


class Scribbler(Peer):
    """Writes no decisions into registers, as fast as it can."""

    def look(self) -> None:
        if self.world.random.random() < 0.1:
            attempt = unread(self.state, self.clock)
            if attempt is not None:
                self.world.settle(self.state.round, attempt, GARBAGE)
        super().look()


class Inventor(Peer):
    """Proposes contributions that do not exist, now and then."""

    def proposal(self, attempt: int, decision: Decision) -> Decision | str:
        if decision.failed or self.state.round % 3 != 1:
            return decision
        others = tuple(entry for entry in decision.entries if entry[0] != self.name)
        entries = tuple(sorted((*others, (self.name, "made up"))))
        return Decision(decision.round, self.name, entries, decision.reports)


class Withholder(Peer):
    """Takes its contribution off its shelf once somebody has it."""

    def look(self) -> None:
        mine = self.contributions.get(self.state.round)
        held = any(
            mine
            and other is not self
            and other.state
            and (self.name, mine.digest) in other.state.here
            for other in self.world.peers.values()
        )
        if held and self.state.round % 3 == 1:
            del self.contributions[self.state.round]
        super().look()


LIARS = (FarCard, WrongCard, Scribbler, Inventor, Withholder)
