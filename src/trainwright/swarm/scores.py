"""How contributions are tried on data: who tries whose, what is measured, what is reported."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainwright.swarm.methods.method import Agreed, Method, Received

TARGETS = 2  # contributions of a round that are tried beside the suspect ones
REPORTERS = 5  # peers that try each
_MOST_PEERS = 1024  # in a report
_MOST_LETTERS = 64  # of a peer's id
_TRIED_SHARE = 0.5  # of a contribution: outer steps overshoot when they are taken alone

Evaluate = Callable[[Tensor, str | None], float]
"""Loss per token of weights (fp32 [count]) on data: what that peer was assigned in the round, or
with None on data that nobody was."""


@dataclass(frozen=True)
class Score:
    """How much lower a contribution alone made the loss: on its peer's data of that round, and on
    data that nobody trained on.
    """

    assigned: float
    unassigned: float


@dataclass(frozen=True)
class Report:
    """What a peer found of a round's contributions.

    `arrivals` counts the listings of the shelves: in which one each contribution was first seen.
    `refused` are those whose own signed bytes prove that they are none (`checks.Refused.proof`).
    """

    round: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    arrivals: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def targets(
    seed: str, me: str, contributors: Iterable[str], suspects: Iterable[str] = ()
) -> list[str]:
    """Whose contributions to a round this peer is to try, sorted; nobody chooses.

    All suspects and `TARGETS` others are tried, each by at most `REPORTERS` of the contributors.
    Who contributed nothing, a validator, tries them all. `seed` is drawn after the contributions
    were decided (`Ledger.to_try` has it).
    """
    peers, first = sorted(set(contributors)), set(suspects)

    def drawn(*about: str) -> bytes:
        return hashlib.sha256("\0".join((seed, *about)).encode()).digest()

    others = sorted((peer for peer in peers if peer not in first), key=drawn)
    chosen = first.intersection(peers).union(others[:TARGETS])

    def tries(target: str) -> bool:
        able = sorted((peer for peer in peers if peer != target), key=lambda x: drawn(target, x))
        return me not in peers or me in able[:REPORTERS]

    return [target for target in sorted(chosen) if tries(target)]


def try_contributions(
    method: Method,
    agreed: Agreed,
    received: Sequence[Received],
    rate: float,
    evaluate: Evaluate,
    chosen: Iterable[str],
) -> dict[str, Score]:
    """The scores of the chosen peers' contributions to a round, from the agreed state before it.

    Each is taken in alone, by half and without the outer momentum, by the method's own `advance`.
    One loss is measured for all, and three for each contribution. Where the loss after it is no
    number, the score is -1e9.
    """
    wanted = set(chosen)
    outer = {name: torch.zeros_like(values) for name, values in agreed.outer.items()}
    still = Agreed(agreed.round, agreed.weights, outer)
    before = evaluate(agreed.weights, None)
    found = {}
    for each in sorted(received, key=lambda each: each.peer):
        if each.peer not in wanted:
            continue
        part = dataclasses.replace(each, values=each.values.mul(_TRIED_SHARE), weight=1.0)
        weights = method.advance(still, [part], rate).weights
        found[each.peer] = Score(
            _drop(evaluate(agreed.weights, each.peer), evaluate(weights, each.peer)),
            _drop(before, evaluate(weights, None)),
        )
    return found


def write_report(report: Report) -> dict[str, Any]:
    """The body of the message `rounds/<r>/scores`."""
    return {
        "round": report.round,
        "scores": {
            peer: [_short(score.assigned), _short(score.unassigned)]
            for peer, score in sorted(report.scores.items())
        },
        "arrivals": dict(sorted(report.arrivals.items())),
        "refused": dict(sorted(report.refused.items())),
    }


def read_report(body: Any) -> Report:
    """What `write_report` wrote; a stranger may have written it. Raises ValueError.

    Numbers are shortened here too: what is read is what is written again, in the ledger.
    """
    if not isinstance(body, dict) or not _whole(body.get("round")):
        raise ValueError("a report is of a round")
    scores = _by_peer(body, "scores", lambda each: isinstance(each, list) and len(each) == 2)
    if not all(_finite(value) for pair in scores.values() for value in pair):
        raise ValueError("a report's scores are two finite numbers each")
    return Report(
        body["round"],
        {peer: Score(_short(pair[0]), _short(pair[1])) for peer, pair in scores.items()},
        _by_peer(body, "arrivals", _whole),
        _by_peer(body, "refused", lambda each: isinstance(each, str) and len(each) <= 200),
    )


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _drop(before: float, after: float) -> float:
    drop = before - after
    return drop if math.isfinite(drop) else -1e9


def _by_peer(body: dict[str, Any], key: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
    found = body.get(key, {})
    if not isinstance(found, dict) or len(found) > _MOST_PEERS:
        raise ValueError(f"a report's {key} are by peer, at most {_MOST_PEERS}")
    if not all(len(peer) <= _MOST_LETTERS and fits(each) for peer, each in found.items()):
        raise ValueError(f"a report's {key} are not what they should be")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9
