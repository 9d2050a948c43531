"""What a ledger has in it: each peer's standing, and the last rounds as far as they are remembered.

All plain values that JSON keeps bit for bit: the ledger is part of the agreed state.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainwright.swarm.conduct import Finding, Sketch, Sketches
from trainwright.swarm.scores import Report, read_report, targets, write_report


@dataclass(frozen=True)
class Standing:
    """What the ledger has of a peer.

    `mean` and `deviation` are its rating (openskill's μ and σ). `strikes` rise by one with each
    offence that is established and fall by a half with each clean round. `effort` says how steadily
    its contributions helped on its own data more than on other data, from -1 to 1. `helped` is
    whether the last one that was tried was of use on its own data; None before that. `excluded` is
    the evidence for which the peer is barred.
    """

    mean: float = 25.0
    deviation: float = 8.33333
    strikes: float = 0.0
    effort: float = 1.0
    helped: bool | None = None
    excluded: str = ""

    def to_json(self) -> list[Any]:
        """The fields in their order."""
        values = (self.mean, self.deviation, self.strikes, self.effort, self.helped, self.excluded)
        return list(values)

    @classmethod
    def from_json(cls, written: Any) -> Standing:
        """What `to_json` wrote; other forms raise ValueError, TypeError or IndexError."""
        *numbers, helped, excluded = written
        if len(numbers) != 4 or helped not in (None, True, False) or not isinstance(excluded, str):
            raise ValueError("no standing")
        mean, deviation, strikes, effort = (float(each) for each in numbers)
        return cls(mean, deviation, strikes, effort, helped, excluded)


@dataclass(frozen=True)
class Past:
    """A round that was judged: what was sent, and what others have reported of it so far."""

    round: int
    count: int  # values of a contribution
    tokens: Mapping[str, float]  # by contributor
    sketches: Sketches = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    reports: Mapping[str, Report] = field(default_factory=dict)
    is_open: bool = True  # whether reports of it still count

    @property
    def seed(self) -> str:
        """A draw that nobody could know before the round was decided."""
        return hashlib.sha256("".join(map(_packed, _values(self.sketches))).encode()).hexdigest()

    def to_try(self, me: str) -> list[str]:
        """Whose contributions this peer is to try on data."""
        suspects = {each.peer for each in self.findings}
        return targets(self.seed, me, self.tokens, suspects)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "round": self.round,
            "count": self.count,
            "tokens": dict(self.tokens),
            "sketches": {peer: _packed(each) for peer, each in self.sketches.items()},
            "findings": [
                [each.peer, each.kind, each.what, each.twin, each.of, each.exact]
                for each in self.findings
            ],
            "reports": {peer: write_report(each) for peer, each in self.reports.items()},
            "is_open": self.is_open,
        }

    @classmethod
    def from_json(cls, written: Any) -> Past:
        """What `to_json` wrote; other forms raise ValueError, TypeError or KeyError."""
        return cls(
            int(written["round"]),
            int(written["count"]),
            {str(peer): float(each) for peer, each in written["tokens"].items()},
            {str(peer): _unpacked(each) for peer, each in written["sketches"].items()},
            tuple(Finding(*each) for each in written["findings"]),
            {str(peer): read_report(each) for peer, each in written["reports"].items()},
            bool(written["is_open"]),
        )


def _values(sketches: Sketches) -> list[Sketch]:
    return [each for _, each in sorted(sketches.items())]


def _packed(sketch: Sketch) -> str:
    return base64.b64encode(np.array(sketch, "<f4").tobytes()).decode()


def _unpacked(text: str) -> Sketch:
    return tuple(np.frombuffer(base64.b64decode(text, validate=True), "<f4").tolist())
