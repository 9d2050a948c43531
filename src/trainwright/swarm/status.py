"""How a run is doing, from what lies open on its shelves: for anybody who can read them, without
being a peer, and without torch.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainwright.swarm import peer_card
from trainwright.swarm.identity import is_peer
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.peer_card import Card, Standings
from trainwright.swarm.transports.transport import Transport

COLUMNS = ("peer", "state", "round", "loss", "tokens", "sent", "received", "rating")


@dataclass(frozen=True)
class PeerStatus:
    """A peer as its card shows it. `alive` is whether it wrote a new card between two looks, None
    if there was only one.
    """

    peer: str
    card: Card
    alive: bool | None = None
    rating: float | None = None
    excluded: str = ""  # why, as more than half of those say who say anything

    @property
    def state(self) -> str:
        """One word for people."""
        if self.excluded:
            return "excluded"
        if self.card.leaving:
            return "left"
        if self.alive is False:
            return "silent"
        return "training" if self.card.active else "watching"


@dataclass(frozen=True)
class RunStatus:
    """A run as it looks just now; `round` is the one that most of its peers work on."""

    manifest: Manifest
    round: int
    peers: tuple[PeerStatus, ...]

    @property
    def excluded(self) -> dict[str, str]:
        """Who is excluded, and why."""
        return {each.peer: each.excluded for each in self.peers if each.excluded}


@dataclass
class Watch:
    """Looks at a run again and again: only that tells who is alive, for nobody's clock is asked."""

    transport: Transport
    manifest: Manifest
    _before: Mapping[str, Card] = field(default_factory=dict)

    def look(self) -> RunStatus:
        """The run now. Raises TransportError while it cannot be reached."""
        cards, standings = dict[str, Card](), list[Standings]()
        for peer in filter(is_peer, self.transport.peers()):
            try:
                data = self.transport.get(peer, peer_card.KEY, peer_card.LARGEST)
                if data is None:
                    continue
                cards[peer] = Card.read(data, self.manifest.run, peer)
                data = self.transport.get(peer, peer_card.STANDINGS, peer_card.LARGEST_STANDINGS)
                if data is not None:
                    standings.append(Standings.read(data, self.manifest.run, peer))
            except ValueError:
                continue
        before, self._before = self._before, cards
        peers = [
            PeerStatus(
                peer,
                card,
                card.sequence > before[peer].sequence if peer in before else None,
                _rating(peer, standings),
                _excluded(peer, standings),
            )
            for peer, card in sorted(cards.items())
        ]
        counted = Counter(each.card.round for each in peers if each.state == "training")
        if not counted:  # the run is over, or everybody is away
            counted = Counter({max((each.card.round for each in peers), default=0): 1})
        front = max(counted, key=lambda round: (counted[round], round))
        return RunStatus(self.manifest, front, tuple(peers))


def table(status: RunStatus) -> list[tuple[str, ...]]:
    """The peers as rows of text under COLUMNS, those that train first; who only came to look or to
    fetch the model, and has gone, is none.
    """
    order = ("training", "watching", "silent", "left", "excluded")
    here = [
        each
        for each in status.peers
        if each.card.active or each.card.tokens or each.state not in ("silent", "left")
    ]
    peers = sorted(here, key=lambda each: (order.index(each.state), each.peer))
    return [
        (
            f"{each.card.name} ({each.peer[:6]})" if each.card.name else each.peer[:6],
            each.state,
            str(each.card.round),
            "–" if each.card.loss is None else f"{each.card.loss:.3f}",
            _short(each.card.tokens),
            _short(each.card.sent) + "B",
            _short(each.card.received) + "B",
            "–" if each.rating is None else f"{each.rating:.1f}",
        )
        for each in peers
    ]


def _rating(peer: str, standings: list[Standings]) -> float | None:
    found = [each.ratings[peer] for each in standings if peer in each.ratings]
    return statistics.median(found) if found else None


def _excluded(peer: str, standings: list[Standings]) -> str:
    reasons = [each.excluded[peer] for each in standings if peer in each.excluded]
    return reasons[0] if 2 * len(reasons) > len(standings) else ""


def _short(count: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    for prefix in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {prefix}"
        count /= 1000
    return f"{count:.3g} T"
