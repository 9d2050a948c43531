"""What a peer knows of a round and of the others, and what follows from it: the state of `rounds`.

Everything here is read only; times are seconds of the peer's own clock, `now` among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainwright.swarm.events import CatchUp, Decision, Fetch, Rules

Votes = dict[str, tuple[int, str]]
"""A round, and the hash of the agreed state before it, by the peer that says so."""


@dataclass(frozen=True)
class Seen:
    """A peer's card, and what it has told so far."""

    sequence: int
    round: int
    base: str
    active: bool
    fresh: float  # when its sequence last grew
    since: float  # since when it has been active, without falling silent


@dataclass(frozen=True)
class Rounds:
    """Where a peer is. Mappings are never changed in place; what can be fetched is known by
    (peer, digest).
    """

    me: str
    rules: Rules
    round: int
    base: str
    electorate: tuple[str, ...]
    excluded: frozenset[str]
    began: float  # the round
    started: float  # this process, with nobody known to it
    ticked: float  # the last tick
    woken: float = float("-inf")  # the last tick after a long time without any
    cards: Mapping[str, Seen] = field(default_factory=dict)
    here: Mapping[tuple[str, str], str] = field(default_factory=dict)  # why refused, or ""
    reports: Mapping[tuple[str, str], int] = field(default_factory=dict)  # in what round they came
    missing: frozenset[tuple[str, str]] = frozenset()
    reached: float | None = None  # when the quorum was complete
    attempt: int = 0  # the first of the round's registers of which nothing is known
    decision: Decision | None = None
    decided: float = 0.0  # when it was known here
    proposers: frozenset[str] = frozenset()  # of this round's decisions: each has one
    front: CatchUp | None = None  # how far more than half of the voters are ahead, and who
    behind: float = 0.0  # since when
    astray: str = ""  # the base that most peers of this round have, if it is another one
    healed: int = -1  # the last round in which this peer took up other weights

    # Time

    @property
    def nap(self) -> float:
        """Without ticks for longer than this a peer was asleep; so long it then looks around."""
        return self.rules.silence / 3

    def past(self, moment: float, now: float) -> bool:
        """Whether a moment is over, and this peer, if it was asleep, has looked around since."""
        return now >= max(moment, self.woken + self.nap)

    # The others

    def fresh(self, card: Seen, now: float) -> bool:
        """Whether it is a sign of life."""
        return now - card.fresh <= self.rules.silence

    def live(self, now: float) -> dict[str, Seen]:
        """The other peers that train and were heard of."""
        barred = self.excluded | {self.me}
        return {
            peer: card
            for peer, card in self.cards.items()
            if card.active and self.fresh(card, now) and peer not in barred
        }

    def unknown(self, now: float) -> set[str]:
        """Who took part in the last agreed round, and may live, but was not seen yet."""
        if now - self.started > self.rules.silence:
            return set()
        return set(self.electorate).difference(self.cards, self.excluded, [self.me])

    def voters(self, now: float) -> Votes:
        """Whose word is believed: the living among those who made the last agreed round, and not
        whoever made up a name. If there are none, all that live.
        """
        live = {peer: (card.round, card.base) for peer, card in self.live(now).items()}
        votes = {peer: vote for peer, vote in live.items() if peer in self.electorate}
        votes |= dict.fromkeys(self.unknown(now), (-1, ""))
        if not votes or self.me in self.electorate:
            votes = {**(votes or live), self.me: (self.round, self.base)}
        return votes

    def ahead(self, votes: Votes, count: int) -> CatchUp | None:
        """The latest round that so many have reached, and which have, if that is ahead."""
        front = sorted((round for round, _ in votes.values()), reverse=True)[count - 1]
        holders = tuple(sorted(peer for peer, (round, _) in votes.items() if round >= front))
        return CatchUp(front, holders) if front > self.round else None

    def went_on(self, now: float) -> CatchUp | None:
        """Those ahead, if they can go on without this peer: half of the voters, or a quorum."""
        voters, live = self.voters(now), self.live(now)
        half = self.ahead(voters, (len(voters) + 1) // 2)
        if half or len(live) < self.rules.quorum:
            return half
        votes = {peer: (card.round, card.base) for peer, card in live.items()}
        return self.ahead(votes, self.rules.quorum)

    def holders(self, now: float) -> tuple[str, ...]:
        """Who has the weights that this peer should have."""
        right = (self.round, self.astray)
        live = self.live(now).items()
        return tuple(sorted(peer for peer, card in live if (card.round, card.base) == right))

    # Contributions

    @property
    def accepted(self) -> dict[str, str]:
        """The newest contribution of each peer that nothing speaks against: its digest."""
        return {
            peer: digest
            for (peer, digest), reason in self.here.items()
            if not reason and peer not in self.excluded
        }

    @property
    def lacking(self) -> list[Fetch]:
        """What was decided and is not here."""
        if self.decision is None:
            return []
        entries = [each for each in self.decision.entries if each not in self.here]
        reports = [each for each in self.decision.reports if each not in self.reports]
        return [
            *(Fetch(self.round, *each) for each in entries),
            *(Fetch(self.round, *each, True) for each in reports),
        ]

    @property
    def awaits_itself(self) -> bool:
        """Whether this peer should contribute, and did not yet."""
        own = self.cards.get(self.me)
        trains = (own is None or own.active) and self.me not in self.excluded
        return trains and not self._is_in(self.me)

    def awaits_anybody(self, now: float) -> bool:
        """Whether somebody can still be expected to contribute.

        Nobody waits for a peer that came in mid-round, unless too few are left of the last round,
        as at the start of a run: what it sends counts if it comes in time, and else it is there in
        the next.
        """
        known = self.electorate if len(self.electorate) >= self.rules.quorum else self.cards
        here = (self.round, self.base)
        expected = self.unknown(now) | {
            peer
            for peer, card in self.live(now).items()
            if (peer in known or card.since <= self.began)
            and (card.round == self.round - 1 or (card.round, card.base) == here)
        }
        return self.awaits_itself or any(not self._is_in(peer) for peer in expected)

    def _is_in(self, peer: str) -> bool:
        return any(peer == contributor for contributor, _ in self.here)
