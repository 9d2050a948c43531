"""What a peer tells of itself and of the others, in two small objects on its shelf.

Its card is rewritten again and again, and tells what it is at. A card that changes is a sign of
life; what it says is believed of its own peer only. Its standings say whom its ledger trusts, for
people to read (`swarm.status`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

from trainwright.swarm.identity import Identity
from trainwright.swarm.message import BadMessage, is_digest, read_message, write_message

KEY = "card"
STANDINGS = "standings"
LARGEST, LARGEST_STANDINGS = 8 * 1024, 128 * 1024  # bytes
_LONGEST_REASON = 300
_MOST_RATINGS, _MOST_REASONS = 600, 30  # that fit into a message, whatever a reason's letters
MOST_WANTS = 16
LONGEST = 100  # characters of a name


@dataclass(frozen=True)
class Card:
    """What a peer says of itself. Fields that are as by default are left out of the message."""

    sequence: int  # grows with every card of the peer, over restarts too
    round: int  # that it works on
    base: str  # hash of its agreed state before that round
    active: bool = False  # it trains and will contribute
    leaving: bool = False
    ready: float | None = None  # seconds until its contribution is ready; None: not known
    offered: str = ""  # digest of its contribution to `round`, once that is on its shelf
    report: str = ""  # digest of its newest scores,
    report_round: int = 0  # which are of this round's contributions
    snapshot: int = -1  # round of the newest snapshot on its shelf; -1: none
    wants: tuple[str, ...] = ()  # what it cannot get, and asks others to put on theirs
    name: str = ""
    version: str = ""
    loss: float | None = None
    tokens: int = 0  # trained by it so far
    sent: int = 0  # bytes that it moved so far
    received: int = 0
    rates: tuple[float, float] | None = None  # bytes per second up and down, as it measured them

    def message(self, run: str, identity: Identity) -> bytes:
        """The card, signed."""
        default = {each.name: each.default for each in fields(self)}
        body = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != default[name] and name != "round"
        }
        return write_message(KEY, run, self.round, body, [], identity)

    @classmethod
    def read(cls, data: bytes, run: str, peer: str) -> Card:
        """A card from a stranger. Raises BadMessage for whatever `message` cannot have written."""
        message = read_message(data, run=run, kind=KEY, limit=LARGEST, peer=peer)
        body = dict(message.body)
        for name, value in body.items():
            check = _CHECKS.get(name)
            if check is None or not check(value):
                raise BadMessage(f"a card cannot have {name}: {str(value)[:40]!r}")
        if missing := {"sequence", "base"} - set(body):
            raise BadMessage(f"a card without {', '.join(sorted(missing))}")
        if "wants" in body:
            body["wants"] = tuple(body["wants"])
        if "rates" in body:
            body["rates"] = (body["rates"][0], body["rates"][1])
        return cls(round=message.round, **body)


@dataclass(frozen=True)
class Standings:
    """What a peer's ledger has of all peers: ratings, and why some are excluded."""

    round: int
    ratings: Mapping[str, float]
    excluded: Mapping[str, str]

    def message(self, run: str, identity: Identity) -> bytes:
        """The standings, signed."""
        rated = islice(self.ratings.items(), _MOST_RATINGS)
        ratings = {peer: float(f"{rating:.4g}") for peer, rating in rated}
        barred = islice(self.excluded.items(), _MOST_REASONS)
        excluded = {peer: plain(why, _LONGEST_REASON) for peer, why in barred}
        body = {"ratings": ratings, "excluded": excluded}
        return write_message(STANDINGS, run, self.round, body, [], identity)

    @classmethod
    def read(cls, data: bytes, run: str, peer: str) -> Standings:
        """Standings from a stranger. Raises BadMessage."""
        message = read_message(data, run=run, kind=STANDINGS, limit=LARGEST_STANDINGS, peer=peer)
        ratings, excluded = message.body.get("ratings"), message.body.get("excluded")
        if not isinstance(ratings, dict) or not all(map(_is_number, ratings.values())):
            raise BadMessage("standings without ratings")
        if not isinstance(excluded, dict) or not all(
            isinstance(why, str) and len(why) <= _LONGEST_REASON for why in excluded.values()
        ):
            raise BadMessage("standings without reasons")
        return cls(message.round, ratings, excluded)


def plain(text: str, most: int) -> str:
    """Text that any message can carry, whoever wrote it: printable, no slashes, not too long."""
    kept = "".join(c if c.isprintable() and c not in "/\\" else "?" for c in text)
    return "" if kept == ".." else kept[:most]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST


def _is_digest(value: Any) -> bool:
    return value == "" or is_digest(value)


_CHECKS = {
    "sequence": _is_count,
    "base": _is_text,
    "active": _is_truth,
    "leaving": _is_truth,
    "ready": _is_number,
    "offered": _is_digest,
    "report": _is_digest,
    "report_round": _is_count,
    "snapshot": _is_count,
    "wants": lambda value: (
        isinstance(value, list) and len(value) <= MOST_WANTS and all(map(_is_text, value))
    ),
    "name": _is_text,
    "version": _is_text,
    "loss": _is_number,
    "tokens": _is_count,
    "sent": _is_count,
    "received": _is_count,
    "rates": lambda value: (
        isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    ),
}
