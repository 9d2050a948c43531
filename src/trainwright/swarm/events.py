"""What happens to a peer in a round, and what it then does: the words of `swarm.rounds`.

Times are seconds of the peer's own monotonic clock; no other peer's clock is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ENTRIES = 350
"""Contributions, and reports, that a decision can name: twice as many fit into a message."""


@dataclass(frozen=True)
class Decision:
    """What a register says of a round: whose contributions make it, by peer and message digest.

    No entries: the round failed, and the agreed weights stay. `reports` are the scores that were
    taken in, likewise.
    """

    round: int
    proposer: str
    entries: tuple[tuple[str, str], ...]
    reports: tuple[tuple[str, str], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether nothing was agreed."""
        return not self.entries


# Events


@dataclass(frozen=True)
class CardSeen:
    """A peer's card as read just now. `sequence` grows with each that it writes: a card that
    stays the same is no sign of life.
    """

    peer: str
    sequence: int
    round: int  # that the peer works on
    base: str  # hash of its agreed state before that round
    active: bool  # it trains and will contribute; not catching up, not leaving, no mere validator


@dataclass(frozen=True)
class Offered:
    """This peer's own contribution is on its shelf."""

    round: int
    digest: str


@dataclass(frozen=True)
class Arrived:
    """Another's contribution was fetched and checked; `reason` says why it is refused, if so."""

    round: int
    peer: str
    digest: str
    reason: str = ""


@dataclass(frozen=True)
class ReportArrived:
    """Another's scores of an earlier round were fetched and checked."""

    peer: str
    digest: str


@dataclass(frozen=True)
class Settled:
    """A register was read or written; `decision` is None where what stands in it is no decision
    that the rules allow, `attempt` which of the round's registers it was.
    """

    round: int
    attempt: int
    decision: Decision | None


@dataclass(frozen=True)
class Missing:
    """What `Fetch` asked for is not to be had from anybody: gone, or never there."""

    round: int
    peer: str
    digest: str


@dataclass(frozen=True)
class Advanced:
    """The agreed state went past a round: `base` is its hash now, before `round`.

    Also after a snapshot was taken up, when `round` may be far ahead. `excluded` are barred.
    """

    round: int
    base: str
    electorate: tuple[str, ...]
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Wake:
    """Time has passed."""


Event = CardSeen | Offered | Arrived | ReportArrived | Settled | Missing | Advanced | Wake

# Actions


@dataclass(frozen=True)
class Propose:
    """Settle the round's register; repeated until a `Settled` comes."""

    attempt: int
    decision: Decision


@dataclass(frozen=True)
class Fetch:
    """Get a contribution that was decided and is not here yet, or a report of scores."""

    round: int
    peer: str
    digest: str
    report: bool = False


@dataclass(frozen=True)
class Advance:
    """All that was decided is here: compute the next agreed state, then say `Advanced`."""

    decision: Decision


@dataclass(frozen=True)
class Hurry:
    """The quorum is complete and this peer's contribution is not, or half the deadline is over:
    send what there is.
    """

    round: int


@dataclass(frozen=True)
class CatchUp:
    """The others are rounds ahead, and their registers or contributions are gone, or cannot be
    had: take up the newest snapshot.
    """

    to: int
    holders: tuple[str, ...]


@dataclass(frozen=True)
class Heal:
    """Most peers of this round have other agreed weights, of hash `base`: take theirs."""

    round: int
    base: str
    holders: tuple[str, ...]


Action = Propose | Fetch | Advance | Hurry | CatchUp | Heal


@dataclass(frozen=True)
class Rules:
    """A run's rules of rounds, the same for all peers; seconds and counts of the recipe's keys."""

    quorum: int = 2
    grace: float = 10.0
    deadline: float = 600.0
    silence: float = 30.0
