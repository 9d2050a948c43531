"""What a decided round makes of the agreed state: the one computation that all peers share.

A function of the state, the decision and the messages that it names, by their digests. Nothing of
this machine goes into it: no clock, no order of arrival, none of the peer's own checks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainwright.recipe.swarm import Swarm
from trainwright.swarm.aggregation import clip_to_median
from trainwright.swarm.agreed_hash import agreed_hash
from trainwright.swarm.checks import Checked, Refused, check_contribution, largest_norm
from trainwright.swarm.events import MOST_ENTRIES, Decision
from trainwright.swarm.identity import Identity, is_peer
from trainwright.swarm.layout import take
from trainwright.swarm.ledger import Ledger, Verdict, judge
from trainwright.swarm.message import (
    HEADER_BYTES,
    BadMessage,
    Message,
    is_digest,
    read_message,
    write_message,
)
from trainwright.swarm.methods.method import Agreed, Method, Received

DECISION_BYTES = HEADER_BYTES + 4096


@dataclass(frozen=True)
class Terms:
    """What of a run every settlement needs, alike on all peers.

    `rate` is the inner learning rate by round, `most_tokens` what a contribution may claim.
    """

    run: str
    method: Method
    swarm: Swarm
    rate: Callable[[int], float]
    most_tokens: int
    seed: int = 0

    @property
    def agrees(self) -> bool:
        """Whether all peers have the same weights after a round."""
        return self.method.agrees

    def rate_of(self, round: int) -> float:
        """The inner learning rate, short enough that machines' cosines cannot differ in it."""
        return float(f"{self.rate(round):.9g}")

    def limit(self, round: int) -> int:
        """The most bytes of a contribution's message."""
        most = self.method.most_bytes(round)
        return min(most, self.swarm.max_bytes or most) + HEADER_BYTES

    def hash(self, agreed: Agreed, ledger: Ledger) -> str:
        """What cards and contributions name; under a method that agrees on nothing, nothing."""
        return agreed_hash(agreed, ledger.to_json()) if self.agrees else ""

    def check(
        self, agreed: Agreed, base: str, message: Message, earlier: Mapping[str, str] = {}
    ) -> Checked | Refused:
        """The first look at a contribution to the round that comes after `agreed`."""
        part = self.method.fragment(agreed.round)
        return check_contribution(
            message,
            method=self.method,
            base=base if self.agrees else None,
            most_norm=largest_norm(take(agreed.weights, part)),
            most_tokens=self.most_tokens,
            earlier=earlier,
        )


class Astray(Exception):  # noqa: N818
    """Most of those who made the last round start from `base`: this peer has gone astray."""

    def __init__(self, base: str) -> None:
        super().__init__(base)
        self.base = base


class Gone(Exception):  # noqa: N818
    """A decided contribution that was here is not any more, and its owner does not have it."""

    def __init__(self, peer: str, digest: str) -> None:
        super().__init__(peer, digest)
        self.peer, self.digest = peer, digest


@dataclass(frozen=True)
class Settlement:
    """The state after a round. `to_try` are contributions, as they came, for this peer to score."""

    agreed: Agreed
    ledger: Ledger
    base: str
    verdicts: tuple[Verdict, ...] = ()
    refused: Mapping[str, Refused] = field(default_factory=dict)
    to_try: Sequence[Received] = ()
    losses: Mapping[str, float] = field(default_factory=dict)


def settle(
    terms: Terms,
    agreed: Agreed,
    ledger: Ledger,
    base: str,
    decision: Decision,
    messages: Iterable[Message],
    reports: Mapping[str, Any],
    me: str,
) -> Settlement:
    """The next agreed state. `messages` are the decided contributions, sorted by peer, of a round
    that failed none; `reports` the bodies of the decided reports, by peer. `me` says only which
    contributions are kept: those that this peer is to try.

    Raises Astray where more than half of those who took part in the last agreed round contribute
    from one other state than `base`; strangers do not count, there is no end of them.
    """
    round = agreed.round
    checked, refused, losses = list[Checked](), dict[str, Refused](), dict[str, float]()
    bases = Counter[str]()
    for message in messages:
        bases[str(message.body.get("base"))] += message.peer in ledger.electorate
        found = terms.check(agreed, base, message)
        if isinstance(found, Refused):
            refused[message.peer] = found
        else:
            checked.append(found)
            if found.loss is not None:
                losses[found.peer] = found.loss
    for most, count in bases.most_common(1):
        if terms.agrees and most != base and 2 * count > len(ledger.electorate):
            raise Astray(most)
    received = [Received(each.peer, each.values, float(each.tokens)) for each in checked]
    del checked
    members = [each.peer for each in received] if terms.agrees else list(dict(decision.entries))
    if members:
        ledger = dataclasses.replace(ledger, electorate=tuple(members))
    to_try: list[Received] = []
    verdicts: tuple[Verdict, ...] = ()
    if terms.agrees:
        ledger, weights, verdicts = judge(ledger, round, received, reports, terms.swarm.trust)
        chosen = ledger.to_try(me) if terms.swarm.trust.scores else []
        to_try = [each for each in received if each.peer in chosen]
        received = [dataclasses.replace(each, weight=weights[each.peer]) for each in received]
        if terms.swarm.trust.clip_to_median and received:
            received = clip_to_median(received)
    after = terms.method.advance(agreed, received, terms.rate_of(round))
    return Settlement(after, ledger, terms.hash(after, ledger), verdicts, refused, to_try, losses)


def most_common(names: Iterable[str]) -> str:
    """The name that is there most often; of several, the one that is there first."""
    return Counter(names).most_common(1)[0][0]


# Decisions


def register(round: int, attempt: int) -> str:
    """Where the decision of a round stands; later attempts count where those before it broke."""
    return f"rounds/{round}" if attempt == 0 else f"rounds/{round}.{attempt}"


def write_decision(decision: Decision, run: str, identity: Identity) -> bytes:
    """A decision as its proposer's message."""
    body = {
        "entries": [list(entry) for entry in decision.entries],
        "reports": [list(entry) for entry in decision.reports],
    }
    return write_message("decision", run, decision.round, body, [], identity)


def read_decision(
    data: bytes, run: str, round: int, quorum: int, excluded: frozenset[str]
) -> Decision | None:
    """The decision in a register; None for what is none or what the rules do not allow: of fewer
    than the quorum but not of nobody, not sorted, or by or of somebody who is excluded. All peers
    pass over the same ones, for they have the same ledger.
    """
    try:
        message = read_message(data, run=run, kind="decision", limit=DECISION_BYTES, round=round)
    except BadMessage:
        return None
    entries, reports = (_pairs(message.body.get(key)) for key in ("entries", "reports"))
    if entries is None or reports is None or 0 < len(entries) < quorum:
        return None
    if excluded & {message.peer, *dict(entries), *dict(reports)}:
        return None
    return Decision(round, message.peer, entries, reports)


def _pairs(value: Any) -> tuple[tuple[str, str], ...] | None:
    """Peers, each once and sorted, with a digest each."""
    if not isinstance(value, list) or len(value) > MOST_ENTRIES:
        return None
    found = []
    for each in value:
        match each:
            case [str(peer), str(digest)] if is_peer(peer) and is_digest(digest):
                found.append((peer, digest))
            case _:
                return None
    names = [peer for peer, _ in found]
    return tuple(found) if names == sorted(set(names)) else None
