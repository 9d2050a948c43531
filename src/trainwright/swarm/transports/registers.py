"""A register that is written once, agreed by messages: single-decree Paxos, as pure functions.

    proposer                          every acceptor
    prepare(ballot)            ──►    promises to take nothing older; says what it took, if anything
    accept(ballot, value)      ──►    takes it, unless it promised a newer ballot since

The value is what was taken under the newest ballot among a quorum's promises, or else the
proposer's own. Once a quorum took a value under one ballot it is chosen, and every newer ballot
finds it, whatever is lost, late, repeated or crashed; but acceptors must not forget (Lamport,
"Paxos Made Simple", 2001).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple


class Ballot(NamedTuple):
    """An attempt to write a register; later ones have higher numbers. One that crashed and came
    back may use a ballot again: whoever promised it before does not promise it twice.
    """

    number: int
    proposer: str


NO_BALLOT = Ballot(0, "")


@dataclass(frozen=True)
class Acceptor:
    """What a voter has promised and taken; to be on disk before any answer goes out."""

    promised: Ballot = NO_BALLOT
    taken: Ballot = NO_BALLOT  # NO_BALLOT: nothing, and `value` means nothing
    value: bytes = b""

    def prepare(self, ballot: Ballot) -> Acceptor | None:
        """The state that promises this ballot, or None: a newer one (or this) was promised."""
        return replace(self, promised=ballot) if ballot > self.promised else None

    def accept(self, ballot: Ballot, value: bytes) -> Acceptor | None:
        """The state that has taken a value, or None: a newer ballot was promised."""
        return Acceptor(ballot, ballot, value) if ballot >= self.promised else None


def is_quorum(votes: Collection[str], electorate: tuple[str, ...]) -> bool:
    """Whether these voters decide: over half of the electorate, or half with its first.

    Any two quorums have a voter in common, which is what makes it safe.
    """
    doubled = 2 * len(set(votes) & set(electorate)) + (electorate[0] in votes)
    return doubled > len(electorate)


@dataclass(frozen=True)
class Proposal:
    """One attempt, and what came back so far. `value` is the proposer's own until phase 2."""

    electorate: tuple[str, ...]
    ballot: Ballot
    value: bytes
    newest: Ballot = NO_BALLOT  # of the values that were promised with
    promises: frozenset[str] = frozenset()
    votes: frozenset[str] = frozenset()

    @property
    def prepared(self) -> bool:
        """Whether a quorum has promised: `value` may now be sent, and changes no more."""
        return is_quorum(self.promises, self.electorate)

    @property
    def chosen(self) -> bool:
        """Whether a quorum has taken `value`: it stands in the register for good."""
        return is_quorum(self.votes, self.electorate)

    def promised(self, voter: str, taken: Ballot, value: bytes) -> Proposal:
        """With one more promise, and what that voter had taken before."""
        if self.prepared or voter not in self.electorate:
            return self
        after = replace(self, promises=self.promises | {voter})
        return replace(after, newest=taken, value=value) if taken > self.newest else after

    def voted(self, voter: str) -> Proposal:
        """With one more voter that took `value` under this ballot."""
        return replace(self, votes=self.votes | {voter})
