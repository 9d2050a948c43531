"""What a peer does in a round: offers, fetches, proposes, computes what was agreed, heals.

Called on the peer's thread, with which it shares all state. What is done stands in order of time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
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
from trainwright.swarm.peer_settle import Astray, Gone, Settlement, settle
from trainwright.swarm.peer_shelves import SNAPSHOT
from trainwright.swarm.peer_upkeep import Upkeep

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
        self.offered: Offered | None = None  # to this round
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
                self._take_up(self.state.agreed.round, to, f"the others are at round {to}")
            case Heal(round):
                self._take_up(self._distrust, round, "most peers have other weights")

    # This peer's contribution

    def offer(self, round: int, local: Tensor, tokens: int, steps: int, loss: float) -> None:
        """Write and publish the trainer's contribution to a round."""
        state, terms, shelves = self.state, self.terms, self.shelves
        rate = terms.rate_of(round)
        self.driver.loss, self.driver.tokens = loss, self.driver.tokens + tokens
        if round != state.agreed.round or self.offered is not None:
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
            if self.state.agreed is state.agreed and self.offered is None:
                self._publish(offered)
            else:
                self.publishing = False

        # Who heals while it writes has another one to write for the same round.
        self.errands.send(("write", round, state.base), "compute", write, written)

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
        self.offered, self.publishing = offered, True

        def published(_: object) -> None:
            self.publishing = False
            newer = self.offered
            if newer is not None and newer is not offered and newer.round == offered.round:
                self._publish(newer)  # given after healing, while the other one was under way
            elif newer is offered:
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
        if card.report and round - 2 <= card.report_round <= round:
            self.reports.listed(card.report_round, peer, card.report)
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
            if self.reports.is_of(digest, peer):
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
            try:
                found = self._kept(round, peer, digest)
                if found is None and decided:
                    found = shelves.decided_contribution(round, peer, digest, others)
                elif found is None:
                    found = shelves.contribution(round, peer)
            except BadMessage as error:  # whatever it is, it is not what the card tells of
                return Arrived(round, peer, "", error.reason)
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
            if self.state.agreed is not state.agreed:
                return  # healed meanwhile: what is right is another now
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

    def _kept(self, round: int, peer: str, digest: str) -> tuple[bytes, Message] | None:
        """What was kept under that digest, if it is that peer's, and whole."""
        data = self.memory.contribution(round, digest)
        message = data and self.shelves.read_kept(data, round, peer, digest)
        return (data, message) if data and message else None

    def _heard(self, report: Message) -> None:
        # One of its own that was on its way while this peer took up a later state is where nobody
        # looks any more: a decision that names it would hold all others up.
        if report.peer != self.me or report.round >= self.state.agreed.round - 2:
            self.driver.tell(ReportArrived(report.peer, report.digest))

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

        def work() -> Settlement | Astray | Gone:
            given = (terms, state.agreed, state.ledger, state.base, decision)
            messages = self._messages(decision)
            try:
                return settle(*given, messages, reports, self.me)
            except (Astray, Gone) as error:
                return error

        def done(found: Settlement | Astray | Gone) -> None:
            if self.state is not state:
                return  # another state was taken up meanwhile
            if isinstance(found, Astray):
                self._take_up(self._distrust, decision.round, "most sent what other weights made")
            elif isinstance(found, Gone):
                self._lacks(decision.round, found.peer, found.digest)
            else:
                self._advanced(decision, found)

        still = lambda: self.state is state  # noqa: E731
        self.errands.send(("advance", decision.round), "compute", work, done, still)

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
            found = self._kept(round, peer, digest)
            found = found or self.shelves.decided_contribution(round, peer, digest, ())
            if found is not None:
                yield found[1]
            elif terms.agrees:  # of a pair one may be gone; without all, nothing is agreed
                raise Gone(peer, digest)

    def _advanced(self, decision: Decision, found: Settlement) -> None:
        before, round = self.state, decision.round
        digest = dict(decision.entries).get(self.me, "")
        offered = self.offered or self.memory.offered(round)
        own = before.own
        refused = found.refused.get(self.me)
        included = bool(digest) and refused is None
        if included and offered and offered.digest == digest:
            own = offered.after or own
        elif self._local is not None:
            rate = self.terms.rate_of(round)
            own = self.terms.method.missed(before.agreed, own, round, self._local, rate)
        self.state = State(found.agreed, own, found.ledger, found.base, included)
        self._distrust = self._distrust if decision.failed else -1
        self.log.round(decision, found)
        self.trial = None
        if found.to_try:
            self.trial = Trial(before.agreed, found.to_try, self.terms.rate_of(round))
        elif not decision.failed and self.driver.active:
            self.reports.tell(round, {})
        outcome = Outcome(
            round,
            before.agreed,
            found.agreed,
            included=included,
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
        self.offered = self._local = None
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
        self.state = replace(state, own=own)

    def _take_up(self, after: int, front: int, why: str) -> None:
        """Go on from the newest snapshot of a round over `after`, and replay what came since."""
        if time.monotonic() < self._asked.get(("", SNAPSHOT), 0.0):
            return
        cards = self.driver.alive()

        def found(state: State | None) -> None:
            if state is None:
                self.wants.add(SNAPSHOT)
                self._asked["", SNAPSHOT] = time.monotonic() + self.driver.heartbeat
                return
            old, self.state, self.trial = self.state, state, None
            self._distrust = state.agreed.round if state.agreed.round <= old.agreed.round else -1
            self.log.took_up(why, old.agreed.round, state.agreed.round)
            self._next(Outcome(old.agreed.round, old.agreed, state.agreed, replaced=True))
            self.upkeep.save(state)

        look = lambda: self.shelves.newest(cards, after, front)  # noqa: E731
        self.errands.send("take up", "bulk", look, found)
