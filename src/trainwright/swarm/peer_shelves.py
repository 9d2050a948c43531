"""What is on the shelves of a run, as messages: read with suspicion, written signed.

Methods are called on several threads, take as long as the link does, and raise TransportError while
it is away; nothing here remembers anything but the rates of the link.

    card · rounds/<r>/contribution · rounds/<r>/scores    what a peer is at, sends, and finds
    standings                                             whom it trusts, for people
    snapshots/<r>                                         the agreed state before round r
    copies/<r>/<digest>                                   what somebody else could not get
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress

from trainwright.swarm import peer_card
from trainwright.swarm.agreed_hash import most_snapshot_bytes, read_snapshot, write_snapshot
from trainwright.swarm.events import Decision
from trainwright.swarm.identity import Identity, is_peer
from trainwright.swarm.ledger import Ledger
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.message import HEADER_BYTES, BadMessage, Message, read_message
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.peer_card import Card
from trainwright.swarm.peer_memory import State
from trainwright.swarm.peer_settle import (
    DECISION_BYTES,
    Terms,
    most_common,
    read_decision,
    register,
    write_decision,
)
from trainwright.swarm.transports.transport import Transport

SNAPSHOT = "snapshot"  # what a card wants that finds none
_WORTH_TIMING = 2**15  # bytes: smaller objects measure the delay of a link, not its rate
REPORT_BYTES = 2 * HEADER_BYTES
_OLD_REPORTS = 4  # rounds after which nobody takes a report in any more


class Shelves:
    """The shelves and registers of one run, seen by one of its peers."""

    def __init__(
        self, transport: Transport, identity: Identity, manifest: Manifest, terms: Terms
    ) -> None:
        self.transport, self.identity = transport, identity
        self.manifest, self.terms, self.run = manifest, terms, manifest.run
        self.me = identity.peer
        self.rates = [0.0, 0.0]  # bytes per second up and down, of the last large objects

    def peers(self) -> list[str]:
        """All others that have a shelf."""
        return [peer for peer in self.transport.peers() if is_peer(peer) and peer != self.me]

    def card(self, peer: str) -> Card | None:
        """A peer's card; None where there is none, or something else in its place."""
        try:
            data = self.transport.get(peer, peer_card.KEY, peer_card.LARGEST)
            return None if data is None else Card.read(data, self.run, peer)
        except ValueError:  # BadMessage is one
            return None

    def put_card(self, card: Card) -> None:
        """Replace this peer's own."""
        self.transport.put(peer_card.KEY, card.message(self.run, self.identity))

    def put_standings(self, round: int, ledger: Ledger) -> None:
        """Tell people whom this peer's ledger trusts."""
        ratings = {peer: each.mean for peer, each in ledger.standing.items()}
        excluded = {peer: ledger.of(peer).excluded for peer in ledger.excluded}
        found = peer_card.Standings(round, ratings, excluded)
        self.transport.put(peer_card.STANDINGS, found.message(self.run, self.identity))

    # Contributions and reports of scores

    def put_contribution(self, round: int, data: bytes) -> None:
        """Publish this peer's own, once and for all."""
        started = time.monotonic()
        self.transport.put(f"rounds/{round}/contribution", data)
        self._time(0, len(data), started)

    def put_report(self, round: int, data: bytes) -> None:
        """Publish this peer's scores of a round's contributions."""
        self.transport.put(f"rounds/{round}/scores", data)

    def put_copy(self, round: int, digest: str, data: bytes) -> None:
        """Put something that was decided in a round, and whose owner is gone, on this shelf."""
        self.transport.put(f"copies/{round}/{digest}", data)

    def contribution(self, round: int, peer: str) -> tuple[bytes, Message] | None:
        """What is a peer's contribution just now; None where there is none.

        Raises BadMessage for something else in its place.
        """
        limit, started = self.terms.limit(round), time.monotonic()
        try:
            data = self.transport.get(peer, f"rounds/{round}/contribution", limit)
        except ValueError:
            raise BadMessage(f"oversized: at most {limit} bytes can be right") from None
        if data is None:
            return None
        self._time(1, len(data), started)
        return data, self.read_contribution(data, round, peer)

    def read_contribution(self, data: bytes, round: int, peer: str) -> Message:
        """The message in these bytes. Raises BadMessage."""
        limit = self.terms.limit(round)
        return read_message(
            data, run=self.run, kind="contribution", limit=limit, peer=peer, round=round
        )

    def read_kept(self, data: bytes, round: int, peer: str, digest: str) -> Message | None:
        """The same, if it is what that digest names; None for whatever else it is."""
        with suppress(BadMessage):
            message = self.read_contribution(data, round, peer)
            return message if message.digest == digest else None
        return None

    def decided_contribution(
        self, round: int, peer: str, digest: str, others: Iterable[str]
    ) -> tuple[bytes, Message] | None:
        """The contribution of that digest, from its owner or as a copy from one of the others."""
        with suppress(BadMessage):
            found = self.contribution(round, peer)
            if found is not None and found[1].digest == digest:
                return found
        limit = self.terms.limit(round)
        for other in others:
            with suppress(ValueError):
                data = self.transport.get(other, f"copies/{round}/{digest}", limit)
                if data is not None:
                    message = self.read_contribution(data, round, peer)
                    if message.digest == digest:
                        return data, message
        return None

    def report(
        self, round: int, peer: str, digest: str, others: Iterable[str] = ()
    ) -> tuple[bytes, Message] | None:
        """The report of that digest, of contributions to a round shortly before `round`."""
        earlier = range(round - 1, max(-1, round - 1 - _OLD_REPORTS), -1)
        places = [(peer, f"rounds/{each}/scores") for each in earlier]
        places += [(other, f"copies/{round}/{digest}") for other in others]
        for holder, key in places:
            with suppress(ValueError):
                data = self.transport.get(holder, key, REPORT_BYTES)
                if data is not None:
                    message = self.read_report(data, peer)
                    if message.digest == digest:
                        return data, message
        return None

    def read_report(self, data: bytes, peer: str) -> Message:
        """The message in these bytes. Raises BadMessage."""
        return read_message(data, run=self.run, kind="scores", limit=REPORT_BYTES, peer=peer)

    # Registers

    def decision(
        self, round: int, attempt: int, excluded: frozenset[str] = frozenset()
    ) -> tuple[bool, Decision | None]:
        """Whether anything stands in a register, and the decision if it is one."""
        try:
            data = self.transport.settled(register(round, attempt), DECISION_BYTES)
        except ValueError:
            return True, None
        return data is not None, None if data is None else self._decision(data, round, excluded)

    def settle(
        self,
        decision: Decision,
        attempt: int,
        electorate: tuple[str, ...],
        excluded: frozenset[str],
    ) -> Decision | None:
        """Write a register, or read what somebody was first with; None for no decision."""
        data = write_decision(decision, self.run, self.identity)
        name = register(decision.round, attempt)
        try:
            found = self.transport.settle(name, data, electorate)
        except ValueError:  # somebody was first with what is larger than any decision
            return None
        return self._decision(found, decision.round, excluded)

    def decided(self, round: int) -> Decision | None:
        """What was decided of a round, if it was: the first of its registers with a decision."""
        attempt, stands = 0, True
        while stands:
            stands, decision = self.decision(round, attempt)
            if decision is not None:
                return decision
            attempt += 1
        return None

    def _decision(self, data: bytes, round: int, excluded: frozenset[str]) -> Decision | None:
        return read_decision(data, self.run, round, self.manifest.rules.quorum, excluded)

    # Snapshots

    def put_snapshot(self, agreed: Agreed, ledger: Ledger) -> None:
        """Publish the agreed state, for those who join."""
        data = write_snapshot(agreed, ledger.to_json(), self.run, self.identity)
        self.transport.put(f"snapshots/{agreed.round}", data)

    def snapshots(self) -> list[tuple[int, str]]:
        """Rounds of all snapshots and on whose shelves they are, newest first."""
        found = []
        for peer in self.transport.peers():
            if is_peer(peer):
                for listed in self.transport.keys(peer, "snapshots"):
                    number = listed.key.rpartition("/")[2]
                    if number.isdigit():
                        found.append((int(number), peer))
        return sorted(found, reverse=True)

    def newest(self, cards: Mapping[str, Card], after: int, front: int) -> State | None:
        """The state in the newest snapshot of a round over `after` that most peers vouch for, with
        no own vectors yet; None where there is none. `front` is as far as the run has come: of
        later rounds anybody can put up anything. `cards` are of those whose word counts.
        """
        others = {peer: card for peer, card in cards.items() if SNAPSHOT not in card.wants}
        others.pop(self.me, None)
        for round, holder in self.snapshots():
            if round > front:
                continue
            if round <= after:
                break
            base = self._vouched(round, others)
            if base is None:
                continue
            try:
                limit = most_snapshot_bytes(self.terms.method.layout.count)
                data = self.transport.get(holder, f"snapshots/{round}", limit)
                if data is None:
                    continue
                agreed, written = read_snapshot(
                    data,
                    run=self.run,
                    peer=holder,
                    round=round,
                    count=self.terms.method.layout.count,
                    base=base or None,
                )
                ledger = Ledger.from_json(written)
            except ValueError:
                continue
            own = self.terms.method.begin(agreed)
            hashed = self.terms.hash(agreed, ledger)
            return State(agreed, own, ledger, hashed)
        return None

    def _vouched(self, round: int, cards: Mapping[str, Card]) -> str | None:
        """The hash that the state before a round must have: what most of the contributions to it
        start from, or more than half of the cards. None where nobody says; "" where nothing is
        agreed.
        """
        if round == 0:
            return self.manifest.genesis
        if not self.terms.agrees:
            return ""
        decision = self.decided(round)
        bases = []
        for peer, digest in decision.entries if decision else ():
            found = self.decided_contribution(round, peer, digest, cards)
            if found is not None:
                bases.append(str(found[1].body.get("base")))
        if bases:
            return most_common(bases)
        votes = Counter(card.base for card in cards.values() if card.round == round)
        return next((base for base, count in votes.items() if 2 * count > len(cards)), None)

    # This peer's own shelf

    def clean(self, before: int, snapshots: int) -> None:
        """Take what is of rounds before the one off this peer's shelf, and snapshots of rounds
        before the other, but not the genesis.
        """
        ends = {"rounds": (0, before), "copies": (0, before), "snapshots": (1, snapshots)}
        for folder, (first, end) in ends.items():
            for listed in self.transport.keys(self.me, folder):
                number = listed.key.split("/")[1]
                if number.isdigit() and first <= int(number) < end:
                    self.transport.delete(listed.key)

    def _time(self, way: int, size: int, started: float) -> None:
        if size >= _WORTH_TIMING:
            self.rates[way] = size / max(time.monotonic() - started, 1e-6)
