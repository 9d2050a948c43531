"""What a peer does in a round: offers, fetches, proposes, computes what was agreed, heals.

Called on the peer's thread, with which it shares all state. What is done stands in order of time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from trainwright.swarm import events
from trainwright.swarm.checks import Refused, contribution_body, planes_digest
from trainwright.swarm.events import (
    Action,
    Advance,
    Advanced,
    Arrived,
    CatchUp,
    Decision,
    Fetch,
    Heal,
    Hurry,
    Missing,
    Propose,
    ReportArrived,
    Settled,
)
from trainwright.swarm.message import BadMessage, Message, write_message
from trainwright.swarm.peer_card import Card
from trainwright.swarm.peer_desk import Outcome
from trainwright.swarm.peer_log import Log
from trainwright.swarm.peer_memory import Offered, State
from trainwright.swarm.peer_reports import Reports, Trial
from trainwright.swarm.peer_settle import Astray, Settlement, settle
from trainwright.swarm.peer_upkeep import SNAPSHOT, Upkeep

if TYPE_CHECKING:
    from trainwright.swarm.peer_driver import Driver

_MOST_VERSIONS = 3  # of its contribution to a round that are fetched of a peer


class Duties:
    """A peer's state, and what it does to bring it from round to round."""

    def __init__(self, driver: Driver, state: State) -> None:
        self.driver, self.state = driver, state
        self.me, self.log = driver.me, Log(driver)
        self.shelves, self.errands = driver.shelves, driver.errands
        self.memory, self.desk, self.terms = driver.memory, driver.desk, driver.shelves.terms
        self.reports = Reports(self.shelves, self.errands, self._heard)
        every = self.terms.swarm.snapshot_every
        self.upkeep = Upkeep(self.shelves, self.memory, self.errands, self.reports, every)
        self.trial: Trial | None = None
        self.wants: set[str] = set()
        self.published = ""  # digest of this round's contribution, once it is on the shelf
        self.publishing = False
        self._offered: Offered | None = None
        self._local: Tensor | None = None  # what the trainer gave for this round
        self._refused: str = ""
        self._earlier: dict[str, str] = {}  # digests of the planes of earlier rounds
        self._fresh: dict[str, tuple[str, str]] = {}  # and of this one's, by message digest
        self._fetched: Counter[str] = Counter()  # contributions of each peer to this round
        self._asked: dict[tuple[str, str], float] = {}  # until when not to ask for something again
        self._distrust = -1  # the snapshot that led astray

    def advanced(self) -> Advanced:
        """Where this peer is, for `rounds`."""
        state = self.state
        return Advanced(state.agreed.round, state.base, state.electorate, state.ledger.excluded)

    def do(self, action: Action) -> None:
        """See to it, unless that is under way."""
        match action:
            case Hurry(round):
                self.desk.hurry(round)
            case Propose(attempt, decision):
                self._propose(attempt, decision)
            case Fetch(round, peer, digest, report):
                self._get(round, peer, digest, report)
            case Advance(decision):
                self._advance(decision)
            case CatchUp(to):
                self._take_up(self.state.agreed.round, f"the others are at round {to}")
            case Heal():
                self._take_up(self._distrust, "most peers have other weights")

    # This peer's contribution

    def offer(self, round: int, local: Tensor, tokens: int, steps: int, loss: float) -> None:
        """Write and publish the trainer's contribution to a round."""
        state, terms, shelves = self.state, self.terms, self.shelves
        rate = terms.rate_of(round)
        self.driver.loss, self.driver.tokens = loss, self.driver.tokens + tokens
        if round != state.agreed.round or self._offered is not None:
            self._missed(local, rate, round)
            return
        self._local, self.publishing = local, True
        if self.trial is not None:  # nobody tried them: what else was seen is told all the same
            self.reports.tell(self.trial.round, {})
            self.trial = None

        def write() -> Offered:
            given = (state.agreed, state.own, round, local, rate)
            planes, own = terms.method.outgoing(*given)
            claimed = max(1, min(tokens, terms.most_tokens))
            body = contribution_body(state.base, claimed, max(1, steps), loss)
            data = write_message("contribution", terms.run, round, body, planes, shelves.identity)
            digest = shelves.read_contribution(data, round, self.me).digest
            offered = Offered(round, digest, data, own)
            self.memory.keep_contribution(round, digest, data)
            if self.memory.due("offered"):
                self.memory.keep_offered(offered)
            return offered

        def written(offered: Offered) -> None:
            if self.state.agreed.round == round and self._offered is None:
                self._publish(offered)
            else:
                self.publishing = False

        self.errands.send(("write", round), "compute", write, written)

    def come_back(self) -> None:
        """All caught up: offer again what was offered for this round before a crash."""
        round = self.state.agreed.round

        def look() -> Offered | None:
            kept = self.memory.offered(round)
            try:
                found = self.shelves.contribution(round, self.me)
            except BadMessage:
                found = None
            if found is None:
                return kept
            data, message = found
            self.memory.keep_contribution(round, message.digest, data)
            after = kept.after if kept and kept.digest == message.digest else None
            return Offered(round, message.digest, data, after)

        def looked(offered: Offered | None) -> None:
            if self.state.agreed.round == round:
                if offered is not None:
                    self._publish(offered)
                self.driver.caught_up(offered is not None)

        if self.driver.active:
            self.errands.send("come back", "bulk", look, looked)
        else:
            self.driver.caught_up(False)

    def _publish(self, offered: Offered) -> None:
        self._offered, self.publishing = offered, True

        def published(_: object) -> None:
            self.publishing = False
            if self._offered is offered:
                self.published = offered.digest
                self.reports.arrived(offered.round, self.me, offered.digest, self.driver.look)
                self.driver.tell(events.Offered(offered.round, offered.digest))

        self.errands.send(
            ("publish", offered.round),
            "bulk",
            lambda: self.shelves.put_contribution(offered.round, offered.data),
            published,
        )

    # Others' contributions

    def heed(self, peer: str, card: Card, look: int) -> None:
        """What another's card asks for: to fetch what it tells of, and to put up what it wants."""
        round = self.state.agreed.round
        if peer in self.state.ledger.excluded:
            return
        if card.round == round and card.offered:
            self.reports.arrived(round, peer, card.offered, look)
            self._get(round, peer, card.offered, decided=False)
        if card.report and card.report_round >= round - 2:
            self.reports.fetch(card.report_round + 1, peer, card.report)
        if card.wants:
            self.upkeep.serve(self.state, peer, card, self.driver.alive())

    def _get(
        self, round: int, peer: str, digest: str, report: bool = False, decided: bool = True
    ) -> None:
        """Fetch a contribution or report, and say what came of it."""
        if (peer, digest) in self.driver.rounds.here and not report:
            return
        if not decided and self._fetched[peer] >= _MOST_VERSIONS:
            return
        if time.monotonic() < self._asked.get((peer, digest), 0.0):
            return
        others = [each for each in self.driver.alive() if each not in (peer, self.me)]
        if report:
            if self.reports.data(digest) is not None:
                self.driver.tell(ReportArrived(peer, digest))
            else:
                lacks = lambda: self._lacks(round, peer, digest)  # noqa: E731
                self.reports.fetch(round, peer, digest, others, lacks)
            return
        if not self.terms.agrees and peer != self.me:  # fetched once it is known who meets whom
            self.driver.tell(Arrived(round, peer, digest))
            return
        state, terms, shelves, memory = self.state, self.terms, self.shelves, self.memory

        def fetch() -> Arrived | None:
            found: tuple[bytes, Message] | None
            try:
                if (data := memory.contribution(round, digest)) is not None:
                    found = data, shelves.read_contribution(data, round, peer)
                elif decided:
                    found = shelves.decided_contribution(round, peer, digest, others)
                else:
                    found = shelves.contribution(round, peer)
            except BadMessage as error:
                return Arrived(round, peer, digest, error.reason)
            if found is None or found[1].round != state.agreed.round:
                return None
            data, message = found
            checked = terms.check(state.agreed, state.base, message, self._earlier)
            memory.keep_contribution(round, message.digest, data)
            if isinstance(checked, Refused):
                if checked.proof:
                    self.errands.call(lambda: self._caught(round, peer, checked.reason))
                return Arrived(round, peer, message.digest, checked.reason)
            self._fresh[message.digest] = planes_digest(message), f"round {round} of {peer}"
            return Arrived(round, peer, message.digest)

        def fetched(found: Arrived | None) -> None:
            if found is None:
                if decided:
                    self._lacks(round, peer, digest)
            else:
                if not decided:  # another one at every look would be a way to fill links
                    self._fetched[peer] += 1
                self.driver.tell(found)

        key = ("contribution", round, peer, digest)
        still = lambda: self.state.agreed.round == round  # noqa: E731
        self.errands.send(key, "bulk", fetch, fetched, still)

    def _heard(self, peer: str, digest: str) -> None:
        self.driver.tell(ReportArrived(peer, digest))

    def _lacks(self, round: int, peer: str, digest: str) -> None:
        """What was decided is not to be had: the others are asked for copies."""
        self.wants.add(f"{round}/{digest}")
        self._asked[peer, digest] = time.monotonic() + self.driver.heartbeat
        self.driver.tell(Missing(round, peer, digest))

    def _caught(self, round: int, peer: str, reason: str) -> None:
        """A peer has signed what cannot be a contribution."""
        self.reports.refused(round, peer, reason)
        self.log.refused(round, peer, reason)

    # The decision, and what follows from it

    def _propose(self, attempt: int, decision: Decision) -> None:
        # Before anything was agreed the starter decides: all proposers must ask the same peers.
        electorate = self.state.electorate or (self.driver.manifest.starter,)
        round, excluded = decision.round, self.state.ledger.excluded
        self.errands.send(
            ("settle", round, attempt),
            "small",
            lambda: self.shelves.settle(decision, attempt, electorate, excluded),
            lambda found: self.driver.tell(Settled(round, attempt, found)),
            lambda: self.state.agreed.round == round,
        )

    def _advance(self, decision: Decision) -> None:
        state, terms = self.state, self.terms
        reports = self.reports.bodies(decision.reports)

        def work() -> Settlement | Astray:
            try:
                return settle(
                    terms,
                    state.agreed,
                    state.ledger,
                    state.base,
                    decision,
                    self._messages(decision),
                    reports,
                    self.me,
                )
            except Astray as astray:
                return astray

        def done(found: Settlement | Astray) -> None:
            if self.state is not state:
                return  # another state was taken up meanwhile
            if isinstance(found, Astray):
                self._take_up(self._distrust, "most contributions start from other weights")
            else:
                self._advanced(decision, found)

        self.errands.send(("advance", decision.round), "compute", work, done)

    def _messages(self, decision: Decision) -> Iterator[Message]:
        """The decided contributions that this peer needs, one at a time; on another thread."""
        terms, round = self.terms, decision.round
        members = [peer for peer, _ in decision.entries]
        needed = members
        if not terms.agrees:
            mine = self.me in members
            needed = terms.method.partners(round, members, self.me, terms.seed) if mine else []
        for peer, digest in decision.entries:
            if peer not in needed:
                continue
            data = self.memory.contribution(round, digest)
            if data is None:
                found = self.shelves.decided_contribution(round, peer, digest, ())
                if found is None:
                    continue  # of a pair one is gone; what was agreed is always here
                data = found[0]
            yield self.shelves.read_contribution(data, round, peer)

    def _advanced(self, decision: Decision, found: Settlement) -> None:
        before, round = self.state, decision.round
        digest = dict(decision.entries).get(self.me, "")
        offered = self._offered or self.memory.offered(round)
        own = before.own
        if digest and offered and offered.digest == digest:
            own = offered.after or own
        elif self._local is not None:
            rate = self.terms.rate_of(round)
            own = self.terms.method.missed(before.agreed, own, round, self._local, rate)
        members = tuple(peer for peer, _ in decision.entries)
        electorate = before.electorate if decision.failed else members
        self.state = State(found.agreed, own, found.ledger, found.base, electorate)
        self._distrust = self._distrust if decision.failed else -1
        self.log.round(decision, found)
        self.trial = None
        if found.to_try:
            self.trial = Trial(before.agreed, found.to_try, self.terms.rate_of(round))
        elif not decision.failed and self.driver.active:
            self.reports.tell(round, {})
        refused = found.refused.get(self.me)
        outcome = Outcome(
            round,
            before.agreed,
            found.agreed,
            included=bool(digest) and refused is None,
            failed=decision.failed,
            reason=refused.reason if refused else "",
        )
        # What was not taken in may honestly be sent again.
        for entry in decision.entries:
            if entry[1] in self._fresh:
                planes, where = self._fresh[entry[1]]
                self._earlier[planes] = where
        self._earlier = dict(list(self._earlier.items())[-1000:])
        self._next(outcome)
        self.upkeep.after_round(self.state, self.driver.alive())

    def _next(self, outcome: Outcome) -> None:
        """The agreed state is another one: nothing of the last round's is under way any more."""
        self._offered = self._local = None
        self.published, self.publishing = "", False
        self._fresh = {}
        self._fetched.clear()
        self._asked.clear()
        self.wants.clear()
        self.driver.deliver(outcome, self.advanced())

    def _missed(self, local: Tensor, rate: float, round: int) -> None:
        """The round was over before the trainer's contribution came."""
        state, method = self.state, self.terms.method
        own = method.missed(state.agreed, state.own, round, local, rate)
        self.state = State(state.agreed, own, state.ledger, state.base, state.electorate)

    def _take_up(self, after: int, why: str) -> None:
        """Go on from the newest snapshot of a round over `after`; the rounds since are replayed."""
        if time.monotonic() < self._asked.get(("", SNAPSHOT), 0.0):
            return
        cards = self.driver.alive()

        def found(state: State | None) -> None:
            if state is None:
                self.wants.add(SNAPSHOT)
                self._asked["", SNAPSHOT] = time.monotonic() + self.driver.heartbeat
                return
            old, self.state = self.state, state
            self._distrust = state.agreed.round if state.agreed.round <= old.agreed.round else -1
            self.log.took_up(why, old.agreed.round, state.agreed.round)
            self._next(Outcome(old.agreed.round, old.agreed, state.agreed, replaced=True))
            self.upkeep.save(state)

        self.errands.send("take up", "bulk", lambda: self.shelves.newest(cards, after), found)
